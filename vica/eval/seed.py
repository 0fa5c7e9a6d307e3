"""SEED-Bench's questions about images: one of four options, of nine types. Those about videos are left out."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ViCAError
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
    gold, path = _gold(folder / "SEED-Bench.json"), folder / "llava-seed-bench.jsonl"
    need(folder / "SEED-Bench-image", PICTURES.format(folder=folder))
    questions = [
        Question(_id(id), text, folder / image, gold.pop(_id(id)))
        for id, image, text in records(path, eval_zip(folder), "question_id", "image", "text")
        if _id(id) in gold
    ]
    if gold:
        raise ViCAError(f"{path} leaves out {len(gold)} questions of SEED-Bench.json: {listed(list(gold))}")
    return questions


def read_hub(split: str) -> list[Question]:
    rows = hub_rows("lmms-lab/SEED-Bench", split)
    return [
        Question(
            _id(row["question_id"]),
            prompt(row["question"], [row[f"choice_{letter}"] for letter in "abcd"]),
            stored_image(rows, number, row["data_id"]),
            dict(answer=row["answer"], type=TYPES[int(row["question_type_id"]) - 1]),
        )
        for number, row in enumerate(rows.remove_columns("image"))
        if row["data_type"] == "image"
    ]


def prompt(question: str, options: list[str]) -> str:
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip("ABCD", options))]) + OPTION_LETTER


def score(questions: Sequence[Question], answers: Answers) -> Score:
    """Only the bare letter counts, as LLaVA counts it: neither "A." nor "a" is A."""
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


def _gold(path: Path) -> dict[int | str, dict]:
    """Of the questions about images, by id."""
    told = read_json(path, QUESTIONS.format(folder=path.parent))
    try:
        names = {number: name for name, number in told["question_type"].items()}
        return {
            _id(question["question_id"]): dict(answer=question["answer"], type=names[question["question_type_id"]])
            for question in told["questions"]
            if question["data_type"] == "image"
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ViCAError(f"{path} is not SEED-Bench.json as published: {error} is amiss. {QUESTIONS}") from error


def _id(id: int | str) -> int | str:
    """SEED-Bench writes numbers as text, LLaVA as numbers."""
    return int(id) if str(id).isdecimal() else id


TASK = Task("seed", "SEED-Bench (images)", "seed_bench", ("test",), 128, read, read_hub, score)
