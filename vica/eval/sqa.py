"""ScienceQA: school questions with two to five options, half of them about a picture.

Its splits: `test` is all of the authors' test, `image` its questions with a picture (SQA-I in papers).
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..utils.errors import ViCAError
from .data import hub_rows, need, read_json, stored_images
from .llava import OPTION_LETTER, eval_zip
from .task import Answers, Question, Score, Task, check_answers, listed, percent

REPOSITORY = "lmms-lab/ScienceQA"
CONFIGS = {"image": "ScienceQA-IMG", "test": "ScienceQA-FULL"}
QUESTIONS = "llava_test_CQM-A.json"
GET = (
    "Get it: wget -P {folder} https://raw.githubusercontent.com/lupantech/ScienceQA/main/data/scienceqa/{file}"
    " (images: https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip)"
)
GET_PICTURES = (
    "Get it: wget https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip && unzip test.zip -d {folder}/images"
)
LETTERS = ("A", "B", "C", "D", "E")
PARTS: dict[str, Callable[[dict], bool]] = {  # as ScienceQA's authors report them
    "natural science": lambda gold: gold["subject"] == "natural science",
    "social science": lambda gold: gold["subject"] == "social science",
    "language science": lambda gold: gold["subject"] == "language science",
    "text context": lambda gold: gold["has_text"],
    "image context": lambda gold: gold["has_image"],
    "no context": lambda gold: not gold["has_text"] and not gold["has_image"],
    "grades 1-6": lambda gold: gold["grade"] in {f"grade{n}" for n in range(1, 7)},
    "grades 7-12": lambda gold: gold["grade"] in {f"grade{n}" for n in range(7, 13)},
}


def read(folder: Path, split: str) -> list[Question]:
    listing = read_json(folder / "pid_splits.json", GET.format(folder=folder, file="pid_splits.json"))["test"]
    problems = read_json(folder / "problems.json", GET.format(folder=folder, file="problems.json"))
    lines = read_json(folder / QUESTIONS, eval_zip(folder))
    if strays := sorted(set(listing) ^ {line["id"] for line in lines}) or [id for id in listing if id not in problems]:
        raise ViCAError(f"the files in {folder} differ in their questions: {listed(strays)}")
    pictures = folder / "images" / "test"
    if any("image" in line for line in lines):
        need(pictures, GET_PICTURES.format(folder=folder))
    return [
        Question(
            line["id"],
            line["conversations"][0]["value"].replace("<image>", "").strip() + OPTION_LETTER,
            pictures / line["image"] if "image" in line else None,
            _gold(problems[line["id"]]),
        )
        for line in lines
        if "image" in line or split == "test"
    ]


def read_hub(split: str) -> list[Question]:
    """Returns the hub's questions. Its rows have no ids, so a question's id is its row number."""
    rows = hub_rows(REPOSITORY, "test", CONFIGS[split])
    return [
        Question(number, _prompt(row), image, _gold({**row, "image": image}))
        for number, (row, image) in enumerate(zip(rows.remove_columns("image"), stored_images(rows)))
    ]


def _prompt(row: dict) -> str:
    context = [f"Context: {row['hint']}"] if row["hint"].strip() else []
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"])]
    text = "\n".join([*context, row["question"], *options])
    return text.replace("  ", " ").strip() + OPTION_LETTER  # LLaVA's file was made this way


def _gold(problem: dict) -> dict:
    gold = {key: problem[key] for key in ("answer", "subject", "topic", "grade")}
    choices = len(problem["choices"])
    return {**gold, "choices": choices, "has_text": bool(problem["hint"]), "has_image": problem["image"] is not None}


def chosen(answer: str, choices: int) -> int | None:
    """Returns the number of the choice that an answer names: by a letter alone, by `X. ` at its beginning, or by one
    `The answer is X` with any character after it (the dot of LLaVA's pattern matches any)."""
    letter: str | None = answer
    if answer not in LETTERS:
        said = re.findall(r"The answer is ([A-Z]).", answer)
        letter = answer[0] if answer[:1] in LETTERS and answer[1:3] == ". " else said[0] if len(said) == 1 else None
    return LETTERS.index(letter) if letter in LETTERS[:choices] else None


def score(questions: Sequence[Question], answers: Answers) -> Score:
    check_answers(questions, answers)
    right = [chosen(answers[one.id], one.gold["choices"]) == one.gold["answer"] for one in questions]
    topics = {one.gold["topic"] for one in questions}
    parts = PARTS | {f"topic: {name}": lambda gold, name=name: gold["topic"] == name for name in sorted(topics)}
    figures = {"all": _accuracy(right)}
    for name, belongs in parts.items():
        figures[name] = _accuracy([hit for hit, one in zip(right, questions) if belongs(one.gold)])
    rows: list[tuple] = [("questions about", "accuracy", "questions")]
    rows += [(name, f"{figures[name]['accuracy']:.2f}", figures[name]["questions"]) for name in ("all", *PARTS)]
    accuracy = figures["all"]["accuracy"]
    return Score("accuracy", accuracy, rows, {"accuracy": accuracy, "questions": len(right), "parts": figures})


def _accuracy(right: Sequence[bool]) -> dict[str, float]:
    return {"questions": len(right), "accuracy": percent(sum(right), len(right))}


TASK = Task("sqa", "ScienceQA", "scienceqa", ("image", "test"), 1024, read, read_hub, score)
