"""Runs one benchmark from its questions to its score."""

import csv
import hashlib
import json
import os
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..utils.errors import ViCAError
from ..utils.progress import counter
from .answering import Answerer
from .answers import FINAL, RESULT, AnswerFiles, answer_line, as_json, read_answers, write_whole
from .ranks import Ranks
from .task import Answers, Question, Score, Task, check_answers, check_ids


@dataclass(frozen=True)
class Outcome:
    """Outcome of one run. `failed` holds by id the reason why a question has no answer. If any failed, there is a score
    only if errors are allowed, and such a question counts as answered with nothing."""

    task: Task
    questions: int
    asked: int  # in this run; the others were answered in an earlier one
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
    """Returns the first process's outcome; the others give it their answers and return None."""
    files = AnswerFiles(folder, ranks.rank)
    settings = all_settings(task, questions, settings)
    if restart:
        files.restart()
    with ranks.in_turn():  # each claims: machines that share no files have folders of their own
        files.claim(settings)
    mine, known = ranks.share(questions), files.read()
    files.drop_cut_line()
    ranks.wait()  # all must have read before any of them appends
    start = time.perf_counter()
    lines: dict[Hashable, dict] = {question.id: known[question.id] for question in mine if question.id in known}
    asked_here = [question for question in mine if question.id not in known]
    lines |= answer_questions(task, asked_here, answer, files, ranks, len(lines))
    gathered = ranks.gather((lines, len(asked_here), time.perf_counter() - start))
    outcome = None
    if gathered is not None:
        lines = {id: line for part, _, _ in gathered for id, line in part.items()}
        files.finish(questions, lines)
        asked_total, seconds = sum(count for _, count, _ in gathered), max(seconds for *_, seconds in gathered)
        outcome = score_file(task, questions, folder, asked_total, seconds, allow_errors)
        write_whole(folder / RESULT, as_json(outcome.as_json(), indent=1))
    ranks.wait()
    files.drop_parts()
    return outcome


def all_settings(task: Task, questions: Sequence[Question], settings: dict) -> dict:
    return settings | {"questions": digest(questions), "max_new_tokens": task.max_new_tokens}


def check_folder(task: Task, questions: Sequence[Question], folder: Path, settings: dict) -> None:
    """Raises at once the refusal that `run_task` would raise only after the earlier benchmarks have been asked."""
    AnswerFiles(folder).check(all_settings(task, questions, settings))


def answer_questions(
    task: Task, questions: list[Question], answer: Answerer, files: AnswerFiles, ranks: Ranks, before: int
) -> dict:
    """Returns the answers' lines by id; each is on disk as soon as it is there. `before` is the number of earlier
    answers."""
    lines = {}
    title = task.title + (f", process 1 of {ranks.world}" if ranks.world > 1 else "")
    total, shown = before + len(questions), ranks.first and bool(questions)
    with counter(total, "questions", title, done=before, shown=shown) as bar:
        for question, text, error in answer(questions, task.max_new_tokens):
            lines[question.id] = answer_line(question, text, error)
            files.append(lines[question.id])
            bar.update()
    return lines


def score_file(
    task: Task, questions: Sequence[Question], folder: Path, asked: int, seconds: float, allow_errors: bool
) -> Outcome:
    """Returns the outcome of the answer file. It scores the file and not the answers in memory, so that the score can
    be checked."""
    lines = read_answers(folder / FINAL)
    failed = {id: line["error"] for id, line in lines.items() if "error" in line}
    score = submission = None
    if not failed or allow_errors:
        wrong: Answers = {question.id: task.wrong(question) for question in questions if question.id in failed}
        answers = {id: wrong[id] if id in wrong else line.get("text", "") for id, line in lines.items()}
        check_answers(questions, answers)
        score = task.score(questions, answers)
        submission = task.submit(questions, answers, folder) if task.submit else None
    return Outcome(task, len(questions), asked, seconds, score, failed, submission)


def digest(questions: Sequence[Question]) -> str:
    """Returns the number of questions and a hash of them, in order, that does not depend on the pictures' folder."""
    folders = {question.image.parent for question in questions if isinstance(question.image, Path)}
    common = os.path.commonpath(folders) if folders else ""

    def name(question: Question) -> str | None:
        return str(question.image.relative_to(common)) if isinstance(question.image, Path) else question.image_key

    content = json.dumps([[question.id, question.prompt, name(question)] for question in questions])
    return f"{len(questions)} ({hashlib.sha256(content.encode()).hexdigest()[:16]})"


def read_questions(task: Task, root: Path | None, split: str | None, limit: int | None) -> list[Question]:
    """Returns the questions from LLaVA's folders under `root`, or from the hub if that is None."""
    split, folder = task.check_split(split), None if root is None else root / task.folder
    place = folder or "the hub"
    try:
        questions = task.read_hub(split) if folder is None else task.read(folder, split)
    except ViCAError:
        raise
    # a file of another kind, or an empty field
    except (LookupError, TypeError, ValueError, AttributeError, csv.Error) as error:
        reason = f"{type(error).__name__} {error}"
        raise ViCAError(f"{task.title}'s questions in {place} are not as published: {reason}") from error
    if not questions:
        raise ViCAError(f"{task.title} has no questions in {place}")
    questions = questions[:limit]
    check_ids(questions)  # before a model is loaded and hours are spent on them
    return questions
