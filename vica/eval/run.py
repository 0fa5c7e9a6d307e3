"""One benchmark from its questions to its score."""

import csv
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..utils.errors import ViCAError
from ..utils.progress import counter
from .answering import Answerer
from .answers import FINAL, RESULT, AnswerFiles, as_json, read_answers, record, write_whole
from .ranks import Ranks
from .task import Question, Score, Task, check_answers, check_ids


@dataclass(frozen=True)
class Outcome:
    """What one run came to. `failed` says by id why a question has no answer; with some there is a score only where
    errors are allowed, and such a question counts as answered with nothing."""

    task: Task
    questions: int
    asked: int  # in this run; the others had their answers from an earlier one
    seconds: float
    score: Score | None
    failed: dict
    submission: Path | None = None

    def as_json(self) -> dict:
        return dict(
            task=self.task.name,
            questions=self.questions,
            asked=self.asked,
            seconds=self.seconds,
            questions_per_s=self.asked / self.seconds if self.asked and self.seconds else None,
            score=self.score and asdict(self.score),
            failed={str(id): reason for id, reason in self.failed.items()},
            submission=self.submission and str(self.submission),
        )


def run_task(
    task: Task,
    questions: Sequence[Question],
    answer: Answerer,
    folder: Path,
    settings: dict,
    ranks: Ranks,
    restart: bool = False,
    allow_errors: bool = False,
) -> Outcome | None:
    """The first process's outcome; the others give it their answers and get None."""
    files = AnswerFiles(folder, ranks.rank)
    settings = all_settings(task, questions, settings)
    if restart:
        files.restart()
    for first in (True, False):  # then the others, whose folder is another where machines share no files
        ranks.wait()
        if first == ranks.first:
            files.claim(settings)
    ranks.wait()
    mine, known = ranks.share(questions), files.read()
    files.mend()
    ranks.wait()  # before anybody appends, everybody has read
    start = time.perf_counter()
    lines = {question.id: known[question.id] for question in mine if question.id in known}
    asked = [question for question in mine if question.id not in known]
    lines |= ask(task, asked, answer, files, ranks, len(lines))
    gathered = ranks.gather((lines, len(asked), time.perf_counter() - start))
    outcome = None
    if gathered is not None:
        lines = {id: line for part, _, _ in gathered for id, line in part.items()}
        files.finish(questions, lines)
        asked, seconds = sum(count for _, count, _ in gathered), max(seconds for *_, seconds in gathered)
        outcome = judge(task, questions, folder, asked, seconds, allow_errors)
        write_whole(folder / RESULT, as_json(outcome.as_json(), indent=1))
    ranks.wait()
    files.drop_parts()
    return outcome


def all_settings(task: Task, questions: Sequence[Question], settings: dict) -> dict:
    return settings | {"questions": digest(questions), "max_new_tokens": task.max_new_tokens}


def check_folder(task: Task, questions: Sequence[Question], folder: Path, settings: dict) -> None:
    """Refuses at once what `run_task` would, when the benchmarks before it have been asked."""
    AnswerFiles(folder).check(all_settings(task, questions, settings))


def ask(task: Task, questions: list[Question], answer: Answerer, files: AnswerFiles, ranks: Ranks, before: int) -> dict:
    """The answers' lines by id, each on disk as soon as it is there. So many there were `before`."""
    lines = {}
    title = task.title + (f", process 1 of {ranks.world}" if ranks.world > 1 else "")
    total, shown = before + len(questions), ranks.first and bool(questions)
    with counter(total, "questions", title, done=before, shown=shown) as bar:
        for question, text, error in answer(questions, task.max_new_tokens):
            lines[question.id] = record(question, text, error)
            files.append(lines[question.id])
            bar.update()
    return lines


def judge(
    task: Task, questions: Sequence[Question], folder: Path, asked: int, seconds: float, allow_errors: bool
) -> Outcome:
    """Scores the file, not what is in memory: what counts can be read."""
    lines = read_answers(folder / FINAL)
    failed = {id: line["error"] for id, line in lines.items() if "error" in line}
    score = submission = None
    if not failed or allow_errors:
        wrong = {question.id: task.wrong(question) for question in questions if question.id in failed}
        answers = {id: wrong.get(id, line.get("text")) for id, line in lines.items()}
        check_answers(questions, answers)
        score = task.score(questions, answers)
        submission = task.submit(questions, answers, folder) if task.submit else None
    return Outcome(task, len(questions), asked, seconds, score, failed, submission)


def digest(questions: Sequence[Question]) -> str:
    """How many, and a hash of what is asked, in order, wherever the pictures' folder lies."""
    folders = {question.image.parent for question in questions if isinstance(question.image, Path)}
    common = os.path.commonpath(folders) if folders else ""

    def name(question: Question) -> str | None:
        return str(question.image.relative_to(common)) if isinstance(question.image, Path) else question.image_key

    told = json.dumps([[question.id, question.prompt, name(question)] for question in questions])
    return f"{len(questions)} ({hashlib.sha256(told.encode()).hexdigest()[:16]})"


def read_questions(task: Task, root: Path | None, split: str | None, limit: int | None) -> list[Question]:
    """From LLaVA's folders under `root`, or from the hub where that is None."""
    split, place = task.check_split(split), "the hub" if root is None else root / task.folder
    try:
        questions = task.read_hub(split) if root is None else task.read(place, split)
    except ViCAError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, csv.Error) as error:  # another file, or an empty field
        told = f"{type(error).__name__} {error}"
        raise ViCAError(f"{task.title}'s questions in {place} are not as published: {told}") from error
    if not questions:
        raise ViCAError(f"{task.title} has no questions in {place}")
    questions = questions[:limit]
    check_ids(questions)  # before a model is loaded and hours are spent on them
    return questions
