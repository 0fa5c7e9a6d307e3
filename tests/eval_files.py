"""Helpers for the benchmark tests: files in their official formats, and the errors about wrong ones."""

import json
from pathlib import Path

import pytest

from vica.eval.task import Question, Task
from vica.utils.errors import ViCAError

SHORT = "\nAnswer the question using a single word or phrase."


def write_lines(path: Path, lines: list[dict]) -> None:
    write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def error_of(act) -> str:
    """Returns the one line of the error that `act` ends with."""
    with pytest.raises(ViCAError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without_pictures(questions: list[Question]) -> list[tuple]:
    return [(question.id, question.prompt, question.gold) for question in questions]


def refuses_wrong_answers(task: Task, questions: list[Question], answer: str) -> None:
    """Checks that a missing answer, a stray one and a repeated question are errors that name the ids."""
    answers = {question.id: answer for question in questions}
    first = questions[0].id
    assert str(first) in error_of(
        lambda: task.score(questions, {id: text for id, text in answers.items() if id != first})
    )
    assert "stray" in error_of(lambda: task.score(questions, answers | {"stray": answer}))
    assert str(first) in error_of(lambda: task.score([*questions, questions[0]], answers))


def names_what_is_missing(task: Task, folder: Path, path: Path, *words: str) -> None:
    """Checks that without `path` the error says which file is expected there, and how to get it."""
    aside = path.rename(path.with_name(path.name + ".aside"))
    error = error_of(lambda: task.read(folder, task.splits[0]))
    aside.rename(path)
    assert error.startswith(f"{path} is not there")
    assert all(word in error for word in words), error
    # a download into another folder than the one that is read would be missed again
    assert "playground/data" not in error
