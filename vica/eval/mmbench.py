"""MMBench and MMBench_CN: one picture, a question and two to four options.

Their tables hold each question once for each rotation of its options: rows 1000241, 2000241 ... are row 241 with its
options in another order. The circular accuracy, which papers report, counts a question only if all of its rows are
right; vanilla accuracy counts the rows that are not rotated. LLaVA's --all-rounds would rotate each row once more; its
scripts do not use it, and neither does this module. In a table without rotated rows both accuracies are the same.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from hashlib import sha1
from pathlib import Path

from ..utils.errors import ViCAError
from .choices import chosen
from .data import hub_rows, need, stored_images
from .llava import OPTION_LETTER
from .tables import read_picture, read_table, write_spreadsheet
from .task import Answers, Question, Score, StoredImage, Task, check_answers, listed, percent

REPOSITORY = "lmms-lab/MMBench"
TABLES = {
    "mmbench": {"dev": "mmbench_dev_20230712.tsv", "test": "mmbench_test_20230712.tsv"},
    "mmbench_cn": {"dev": "mmbench_dev_cn_20231003.tsv", "test": "mmbench_test_cn_20231003.tsv"},
}
GET = "Get it: wget -P {folder} https://download.openmmlab.com/mmclassification/datasets/mmbench/{file}"
INSTRUCTIONS = {
    "mmbench": OPTION_LETTER,
    "mmbench_cn": "\n请直接回答选项字母。",
}
LETTERS = "ABCD"
TURN = 1_000_000  # a rotated row's number is its question's plus this, twice this, ...
# Texts that pandas, with which LLaVA's script reads the table, takes for an empty cell; nan and none count in any case.
NOTHING = set("|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|n/a|null|-nan|-NaN".split("|"))


def read(name: str, folder: Path, split: str) -> list[Question]:
    path = folder / TABLES[name][split]
    need(path, GET.format(folder=folder, file=path.name))
    rows, pictures = [], {}
    for place, row in read_table(path):
        if lacking := {"index", "question", "image", *"AB"} - row.keys():
            raise ViCAError(f"{path} has no column {', '.join(sorted(lacking))}")
        where = cell = row.pop("image")  # the picture, or the number of the row that holds it
        if len(cell) > 64:
            where = row["index"]
            pictures[where] = StoredImage(sha1(cell.encode()).hexdigest(), partial(read_picture, path, place, "image"))
        rows.append((row, where))
    if strays := [row["index"] for row, where in rows if where not in pictures]:
        raise ViCAError(f"{path}: the picture of these rows is not there: {listed(strays)}")
    return [_question(name, row, pictures[where]) for row, where in rows]


def read_hub(name: str, split: str) -> list[Question]:
    rows = hub_rows(REPOSITORY, split, {"mmbench": "en", "mmbench_cn": "cn"}[name])
    return [_question(name, row, image) for row, image in zip(rows.remove_columns("image"), stored_images(rows))]


def _question(name: str, row: dict, image: StoredImage | None) -> Question:
    row = {column.replace("L2", "l2"): None if _is_empty(value) else value for column, value in row.items()}
    options = {letter: row[letter] for letter in LETTERS if row.get(letter) is not None}
    shown = next((n for n, letter in enumerate(LETTERS) if letter not in options), len(LETTERS))
    hint = [] if row.get("hint") is None else [row["hint"]]
    lines = [*hint, row["question"], *(f"{letter}. {options[letter]}" for letter in LETTERS[:shown])]
    gold = {"answer": row.get("answer"), "options": options, "question": row["question"]}
    gold |= {column: row.get(column) for column in ("category", "l2-category", "split")}
    return Question(int(row["index"]), "\n".join(lines) + INSTRUCTIONS[name], image, gold)


def _is_empty(value) -> bool:
    return value is None or value in NOTHING or str(value).lower() in ("nan", "none")


def score(questions: Sequence[Question], answers: Answers) -> Score:
    check_answers(questions, answers)
    if any(one.gold["answer"] is None for one in questions):
        return Score(
            "circular accuracy", None, [("ability", "rows"), ("all", len(questions))], {"rows": len(questions)}
        )
    rows_of: dict[int, list[tuple[Question, bool]]] = defaultdict(list)
    for one in sorted(questions, key=lambda one: one.id):  # the unrotated row comes first
        right = chosen(answers[one.id], one.gold["options"]) == one.gold["answer"]
        rows_of[int(one.id) % TURN].append((one, right))
    parts = {"all": _accuracies(rows_of.values())}
    for kind in ("l2-category", "category"):
        for name in sorted({str(rows[0][0].gold[kind]) for rows in rows_of.values()}):
            mine = [rows for rows in rows_of.values() if str(rows[0][0].gold[kind]) == name]
            parts[f"{kind}: {name}"] = _accuracies(mine)
    kinds = ("circular", "vanilla", "vanilla_all")
    table: list[tuple] = [("ability", "circular", "vanilla", "vanilla, all rows", "questions")]
    table += [(name, *(f"{part[kind]:.2f}" for kind in kinds), part["questions"]) for name, part in parts.items()]
    return Score("circular accuracy", parts["all"]["circular"], table, {**parts["all"], "parts": parts})


def _accuracies(groups: Iterable[list[tuple[Question, bool]]]) -> dict[str, float]:
    rights = [[right for _, right in rows] for rows in groups]
    return {
        "questions": len(rights),
        "circular": percent(sum(map(all, rights)), len(rights)),
        "vanilla": percent(sum(rows[0] for rows in rights), len(rights)),
        "vanilla_all": percent(sum(map(sum, rights)), sum(map(len, rights))),
    }


def submit(name: str, questions: Sequence[Question], answers: Answers, folder: Path) -> Path:
    """Writes LLaVA's spreadsheet, with its columns in their order: the table's own without hint, picture and
    abilities."""
    check_answers(questions, answers)
    extra = [column for column in ("answer", "split") if any(one.gold[column] is not None for one in questions)]
    rows = [["index", "question", *LETTERS, "prediction", *extra]]
    for one in questions:
        options = [one.gold["options"].get(letter) for letter in LETTERS]
        rows.append([one.id, one.gold["question"], *options, answers[one.id], *(one.gold[column] for column in extra)])
    return write_spreadsheet(folder / f"{name}.xlsx", rows)


def _task(name: str, title: str) -> Task:
    reads = partial(read, name), partial(read_hub, name)
    return Task(name, title, name, ("dev", "test"), 1024, *reads, score, partial(submit, name))


ENGLISH = _task("mmbench", "MMBench")
CHINESE = _task("mmbench_cn", "MMBench_CN")
