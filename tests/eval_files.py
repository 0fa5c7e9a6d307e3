"""For the tests of the benchmarks: files in their official layouts, and what is said of wrong ones."""

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


def told(act) -> str:
    """The one line of the error that `act` ends with."""
    with pytest.raises(ViCAError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without_pictures(questions: list[Question]) -> list[tuple]:
    return [(question.id, question.prompt, question.gold) for question in questions]


def refuses_wrong_answers(task: Task, questions: list[Question], answer: str) -> None:
    """One missing, one too many, one question twice: the ids are named."""
    answers = {question.id: answer for question in questions}
    first = questions[0].id
    assert str(first) in told(lambda: task.score(questions, {id: text for id, text in answers.items() if id != first}))
    assert "stray" in told(lambda: task.score(questions, answers | {"stray": answer}))
    assert str(first) in told(lambda: task.score([*questions, questions[0]], answers))


def names_what_is_missing(task: Task, folder: Path, path: Path, *words: str) -> None:
    """Without `path` the error says which file is expected where, and what gets it."""
    aside = path.rename(path.with_name(path.name + ".aside"))
    error = told(lambda: task.read(folder, task.splits[0]))
    aside.rename(path)
    assert error.startswith(f"{path} is not there")
    assert all(word in error for word in words), error
    assert "playground/data" not in error  # got into another folder than the one that is read, it would be missed again
