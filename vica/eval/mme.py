"""MME: two questions a picture, one with the answer yes and one with no; accuracy+ counts pictures with both right."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..utils.errors import ViCAError
from .data import hub_rows, need, stored_image
from .llava import SHORT_ANSWER, eval_zip, records
from .task import Answers, Question, Score, StoredImage, Task, check_answers, listed

GROUPS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}
RELEASE = (
    "MME_Benchmark_release_version comes from its authors, see the branch Evaluation of "
    "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models; the hub has the same questions: "
    "vica eval mme --hub"
)
YES_OR_NO = "Please answer yes or no."  # MME's own files end with it; LLaVA asks for a word or phrase instead


def read(folder: Path, split: str) -> list[Question]:
    root, path = need(folder / "MME_Benchmark_release_version", RELEASE), folder / "llava_mme.jsonl"
    asked: list[tuple[str, str, str, Path | StoredImage, str]] = []
    known: dict[str, dict[str, str]] = {}
    for name, text, category in records(path, eval_zip(folder), "question_id", "text", "category"):
        known[name] = known.get(name) or _answers(root, name)
        if (bare := _bare(text)) not in known[name]:
            raise ViCAError(f"{path} asks of {name} what its text file in {root} does not: {bare}")
        asked.append((name, text, category, _picture(root, name), known[name][bare]))
    return _paired(asked)


def read_hub(split: str) -> list[Question]:
    rows = hub_rows("lmms-lab/MME", split)
    asked = []
    for number, row in enumerate(rows.remove_columns("image")):
        name, text = row["question_id"], _bare(row["question"]) + SHORT_ANSWER
        asked.append((name, text, row["category"], stored_image(rows, number, name), row["answer"]))
    return _paired(asked)


def score(questions: Sequence[Question], answers: Answers) -> Score:
    check_answers(questions, answers)
    figures: dict[str, dict[str, Any]] = {}
    rows: list[tuple] = [("category", "accuracy", "accuracy+", "score")]
    for group, categories in GROUPS.items():
        asked = {name: [q for q in questions if q.gold["category"] == name] for name in categories}
        counted = {name: _count(asked[name], answers) for name in categories if asked[name]}
        for name, count in counted.items():
            rows.append((name, *(f"{count[figure]:.2f}" for figure in ("accuracy", "accuracy+", "score"))))
        figures[group] = dict(score=sum(count["score"] for count in counted.values()), categories=counted)
    rows += [(group, "", "", f"{figures[group]['score']:.2f}") for group in GROUPS]
    return Score("perception", figures["perception"]["score"], rows, figures, full=2000)


def yes_or_no(answer: str) -> str:
    """Returns yes, no or other: the word that the first four characters hold."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _count(asked: Sequence[Question], answers: Answers) -> dict:
    said = [yes_or_no(answers[question.id]) for question in asked]
    wrong = [question.gold["picture"] for question, word in zip(asked, said) if word != question.gold["answer"]]
    pictures = {question.gold["picture"] for question in asked}
    # Divide first and multiply by 100 after, as the authors do, so that the sums agree to the last bit.
    accuracy = 100 * ((len(asked) - len(wrong)) / len(asked))
    plus = 100 * (len(pictures - set(wrong)) / len(pictures))
    counts = dict(questions=len(asked), pictures=len(pictures), other=said.count("other"))
    return counts | {"accuracy": accuracy, "accuracy+": plus, "score": accuracy + plus}


def _paired(asked: Iterable[tuple[str, str, str, Path | StoredImage, str]]) -> list[Question]:
    """Returns questions from (picture's name, prompt, category, picture, answer). LLaVA names both questions of a
    picture after it."""
    times: Counter[str] = Counter()
    questions, categories = [], sum(GROUPS.values(), [])
    for name, prompt, category, picture, answer in asked:
        if category not in categories:
            raise ViCAError(f"MME has no category {category!r}, of {name}; it has {', '.join(categories)}")
        times[name] += 1
        gold = dict(answer=answer.strip().lower(), category=category, picture=name)
        questions.append(Question(f"{name}#{times[name]}", prompt, picture, gold))
    if odd := [name for name, count in times.items() if count != 2]:
        raise ViCAError(f"MME asks two questions of each picture, but not of {listed(odd)}")
    return questions


def _answers(root: Path, name: str) -> dict[str, str]:
    """Returns the answers by question. Some categories keep texts and pictures in separate folders, in this release or
    another."""
    category, file = name.split("/")[0], name.split("/")[-1].split(".")[0] + ".txt"
    apart = root / category / "questions_answers_YN"
    path = need((apart if apart.is_dir() else root / category) / file, RELEASE)
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(line) != 2 for line in lines):
        raise ViCAError(f"{path} has a line that is not a question, a tab and an answer")
    return {_bare(question): answer for question, answer in lines}


def _picture(root: Path, name: str) -> Path:
    category, file = name.split("/")[0], name.split("/")[-1]
    places = [root / name, root / category / "images" / file, root / category / file]
    return next((place for place in places if place.exists()), places[0])


def _bare(question: str) -> str:
    return question.strip().removesuffix(SHORT_ANSWER.strip()).strip().removesuffix(YES_OR_NO).strip()


TASK = Task("mme", "MME", "MME", ("test",), 128, read, read_hub, score)
