"""SEED-Bench's questions about images: one of four options, of nine types. Its questions about videos are left out.

If two questions share an id, the second gets the suffix #2.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..utils.errors import ViCAError
from .data import hub_rows, need, read_json, stored_image
from .llava import OPTION_LETTER, eval_zip, records
from .task import Answers, Question, Score, Task, check_answers, listed, percent

TYPES = (
    "Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location", "Instances Counting",
    "Spatial Relation", "Instance Interaction", "Visual Reasoning", "Text Understanding",
)  # fmt: skip
QUESTIONS = "hf download --repo-type dataset AILab-CVC/SEED-Bench SEED-Bench.json --local-dir {folder}"
PICTURES = QUESTIONS.replace(".json", "-image.zip") + " && unzip {folder}/SEED-Bench-image.zip -d {folder}"


def read(folder: Path, split: str) -> list[Question]:
    known, path = _known(folder / "SEED-Bench.json"), folder / "llava-seed-bench.jsonl"
    need(folder / "SEED-Bench-image", PICTURES.format(folder=folder))
    questions = []
    for id, image, text in records(path, eval_zip(folder), "question_id", "image", "text"):
        if named := known.get(_id(id)):
            mine = next((one for one in named if image.endswith(one[0]) and text.startswith(one[1])), named[0])
            named.remove(mine)
            questions.append(Question(_id(id), text, folder / image, mine[2]))
    asked = {question.id for question in questions}
    if left := [id for id in known if id not in asked]:
        raise ViCAError(f"{path} leaves out {len(left)} questions of SEED-Bench.json: {listed(left)}")
    return _with_distinct_ids(questions)


def read_hub(split: str) -> list[Question]:
    rows = hub_rows("lmms-lab/SEED-Bench", split)
    return _with_distinct_ids(
        Question(
            _id(row["question_id"]),
            prompt(row["question"], [row[f"choice_{letter}"] for letter in "abcd"]),
            stored_image(rows, number, row["data_id"]),
            dict(answer=row["answer"], type=TYPES[int(row["question_type_id"]) - 1]),
        )
        for number, row in enumerate(rows.remove_columns("image"))
        if row["data_type"] == "image"
    )


def prompt(question: str, options: list[str]) -> str:
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip("ABCD", options))]) + OPTION_LETTER


def score(questions: Sequence[Question], answers: Answers) -> Score:
    """Returns the score. Only the bare letter counts, as in LLaVA: neither "A." nor "a" is A."""
    check_answers(questions, answers)
    figures = {}
    for type in dict.fromkeys([*TYPES, *(question.gold["type"] for question in questions)]):
        if asked := [question for question in questions if question.gold["type"] == type]:
            figures[type] = _count(asked, answers)
    figures["all"] = _count(questions, answers)
    rows = [("type", "accuracy", "questions")]
    rows += [(type, f"{count['accuracy']:.2f}", count["questions"]) for type, count in figures.items()]
    return Score("accuracy", figures["all"]["accuracy"], rows, figures)


def _count(questions: Sequence[Question], answers: Answers) -> dict:
    right = sum(answers[question.id] == question.gold["answer"] for question in questions)
    return dict(questions=len(questions), right=right, accuracy=percent(right, len(questions)))


def _known(path: Path) -> dict[int | str, list[tuple[str, str, dict]]]:
    """Returns the questions about images by id: for each its picture, its words, and the scorer's data."""
    get = QUESTIONS.format(folder=path.parent)
    published = read_json(path, get)
    known: dict[int | str, list[tuple[str, str, dict]]] = {}
    try:
        names = {number: name for name, number in published["question_type"].items()}
        for one in published["questions"]:
            if one["data_type"] == "image":
                gold = dict(answer=one["answer"], type=names[one["question_type_id"]])
                known.setdefault(_id(one["question_id"]), []).append((one["data_id"], one["question"], gold))
    except (KeyError, TypeError, AttributeError) as error:
        raise ViCAError(f"{path} is not SEED-Bench.json as published: {error} is amiss. {get}") from error
    return known


def _with_distinct_ids(questions: Iterable[Question]) -> list[Question]:
    times: Counter[int | str] = Counter()
    distinct = []
    for question in questions:
        times[question.id] += 1
        count = times[question.id]
        distinct.append(question if count == 1 else replace(question, id=f"{question.id}#{count}"))
    return distinct


def _id(id: int | str) -> int | str:
    """Returns an id as a number if it is one: SEED-Bench writes numbers as text, LLaVA as numbers."""
    return int(id) if str(id).isdecimal() else id


TASK = Task("seed", "SEED-Bench (images)", "seed_bench", ("test",), 128, read, read_hub, score)
