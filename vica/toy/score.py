"""Counts the toy world's questions with a right answer, by kind."""

import json
import string
from collections.abc import Mapping
from pathlib import Path

from ..utils.errors import ViCAError


def read_questions(path: Path) -> list[dict]:
    """Returns the lines of `test.jsonl`."""
    with open(path) as file:
        return [json.loads(line) for line in file]


def score(questions: list[dict], answers: Mapping[int, str]) -> dict[str, tuple[int, int]]:
    """Returns the number of right answers and of questions by kind, and for "all". `answers` has one for each
    question_id."""
    asked = {question["question_id"] for question in questions}
    if strays := asked ^ answers.keys():
        missing = len(asked - answers.keys())
        raise ViCAError(
            f"{missing} of {len(asked)} questions have no answer, {len(strays) - missing} answers no question; "
            f"the first is question_id {min(strays)}"
        )
    counts: dict[str, tuple[int, int]] = {}
    for question in sorted(questions, key=lambda question: question["kind"]):
        right = normalised(answers[question["question_id"]]) == normalised(question["answer"])
        for kind in (question["kind"], "all"):
            before, total = counts.get(kind, (0, 0))
            counts[kind] = before + right, total + 1
    return {**{kind: count for kind, count in counts.items() if kind != "all"}, "all": counts.get("all", (0, 0))}


def normalised(answer: str) -> str:
    """Returns the answer without case, punctuation and needless space."""
    return " ".join(answer.lower().translate(str.maketrans("", "", string.punctuation)).split())
