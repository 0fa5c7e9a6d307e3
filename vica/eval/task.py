"""Defines a benchmark: questions read from one of two places, and a score computed from their answers."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.errors import ViCAError

Answers = Mapping[Hashable, str]  # by question id


@dataclass(frozen=True)
class StoredImage:
    """An image inside a dataset, read only when it is needed. Rows with the same `key` hold the same picture."""

    key: str
    read: Callable[[], bytes] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Question:
    """One question. `id` is unique in its task and is a number or a text, for JSON. `prompt` is the user's message
    without `<image>`. `gold` holds the scorer's data, above all the right answer."""

    id: int | str
    prompt: str
    image: Path | StoredImage | None
    gold: dict[str, Any] = field(default_factory=dict)

    @property
    def image_key(self) -> str | None:
        if isinstance(self.image, StoredImage):
            return self.image.key
        return None if self.image is None else str(self.image)


@dataclass(frozen=True)
class Score:
    """The score of a benchmark. `value` is the one number that tables show, out of `full`; None if only the benchmark's
    owners can score. `rows` is a table with its heading; `figures` holds all counts, in JSON's types."""

    metric: str
    value: float | None
    rows: list[tuple]
    figures: dict[str, Any]
    full: float = 100


@dataclass(frozen=True)
class Task:
    """One benchmark. `read` takes LLaVA's folder and a split, `read_hub` a split; both return the questions in the
    order of their files. `score` takes all questions and an answer for each. `submit` writes the file that the
    benchmark's server accepts into a folder, and returns its path."""

    name: str
    title: str
    folder: str  # LLaVA's, under playground/data/eval
    splits: tuple[str, ...]  # the first is the default
    max_new_tokens: int
    read: Callable[[Path, str], list[Question]]
    read_hub: Callable[[str], list[Question]]
    score: Callable[[Sequence[Question], Answers], Score]
    submit: Callable[[Sequence[Question], Answers, Path], Path] | None = None
    wrong: Callable[[Question], str] = lambda question: ""  # stands in for the answer of a failed question

    def check_split(self, split: str | None) -> str:
        if split is not None and split not in self.splits:
            raise ViCAError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        return split or self.splits[0]


def check_answers(questions: Sequence[Question], answers: Answers) -> None:
    """Checks that there is one answer for each question and no other."""
    check_ids(questions)
    asked = {question.id for question in questions}
    if missing := [question.id for question in questions if question.id not in answers]:
        raise ViCAError(f"{len(missing)} of {len(questions)} questions have no answer: {listed(missing)}")
    if strays := [id for id in answers if id not in asked]:
        raise ViCAError(f"{len(strays)} answers belong to no question: {listed(strays)}")


def check_ids(questions: Sequence[Question]) -> None:
    times = Counter(question.id for question in questions)
    if twice := [id for id, count in times.items() for _ in range(count - 1)]:
        raise ViCAError(f"{len(twice)} questions share their id with another: {listed(twice)}")


def listed(ids: Sequence, most: int = 10) -> str:
    return ", ".join(map(str, ids[:most])) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def percent(right: float, of: int) -> float:
    return 100 * right / of if of else 0.0
