"""Keeps answers on disk. Each process appends its answers to a part of its own as they come, and a run that was killed
resumes from the parts. At the end they become one file, in the order of the questions, that does not show the parts."""

import json
import os
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TextIO

from ..utils.errors import ViCAError
from .task import Question, listed

FINAL, SETTINGS, PARTS, RESULT = "answers.jsonl", "run.json", "part-*.jsonl", "result.json"


def answer_line(question: Question, text: str | None, error: str | None = None) -> dict:
    """Returns a line of the answer file, with LLaVA's key names; `error` in place of a text if the question failed."""
    outcome = {"text": text} if error is None else {"error": error}
    return {"question_id": question.id, "prompt": question.prompt, **outcome}


class AnswerFiles:
    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self.part = folder, folder / PARTS.replace("*", f"{rank:04}")
        self.file: TextIO | None = None

    def restart(self) -> None:
        """Removes all earlier files, the settings last: after a kill in between, the remaining files can still be
        identified."""
        names: list[str | Path] = [*self._parts(), FINAL, *self._submission(), RESULT, SETTINGS]
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def claim(self, settings: dict) -> None:
        self.check(settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / SETTINGS).exists():
            write_whole(self.folder / SETTINGS, json.dumps(settings) + "\n")

    def check(self, settings: dict) -> None:
        """Refuses to resume from answers that were given with other settings."""
        path = self.folder / SETTINGS
        if not path.exists():
            return
        try:
            earlier = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ViCAError(f"{path} does not say what the answers beside it are of. --restart drops them") from error
        if differs := [key for key in {**settings, **earlier} if earlier.get(key) != settings.get(key)]:
            shown = "; ".join(f"{key} {earlier.get(key)!r}, now {settings.get(key)!r}" for key in differs)
            raise ViCAError(
                f"{self.folder} holds answers of another run: {shown}. --restart drops them, --out FOLDER keeps them"
            )

    def read(self) -> dict[Hashable, dict]:
        """Returns the answers so far, by id. Failed questions are left out, so they are asked again."""
        final = self.folder / FINAL
        lines = list(read_answers(final).values()) if final.exists() else []
        lines += [line for part in self._parts() for line in read_records(part)]
        return {line["question_id"]: line for line in reversed(lines) if "error" not in line}

    def append(self, line: dict) -> None:
        self.file = self.file or open(self.part, "a", encoding="utf-8")
        self.file.write(as_json(line))
        self.file.flush()

    def drop_cut_line(self) -> None:
        """Drops a last line that a kill cut short: the next append must begin on a line of its own."""
        if self.part.exists():
            with open(self.part, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def finish(self, questions: Sequence[Question], lines: dict[Hashable, dict]) -> None:
        if missing := [question.id for question in questions if question.id not in lines]:
            raise ViCAError(f"{len(missing)} of {len(questions)} questions have no answer: {listed(missing)}")
        write_whole(self.folder / FINAL, "".join(as_json(lines[question.id]) for question in questions))

    def drop_parts(self) -> None:
        if self.file is not None:
            self.file.close()
        for part in self._parts():
            part.unlink(missing_ok=True)

    def _submission(self) -> list[str]:
        """Returns the name of an earlier submission file, which would be mistaken for one of the new answers."""
        try:
            return [Path(json.loads((self.folder / RESULT).read_bytes())["submission"]).name]
        except (OSError, ValueError, LookupError, TypeError):  # no earlier submission
            return []

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(PARTS))


def as_json(value, indent: int | None = None) -> str:
    """Returns JSON with readable letters, or with escapes if the text holds a lone surrogate, which UTF-8 cannot
    encode."""
    text = json.dumps(value, ensure_ascii=False, indent=indent) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent) + "\n"
    return text


def read_records(path: Path) -> list[dict]:
    """Returns all whole lines; the last may have been cut short, even within a letter."""
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ViCAError(f"{path} holds a line that is no JSON: {error}") from error


def read_answers(path: Path) -> dict[Hashable, dict]:
    """Returns the lines of a finished file by id; each id may occur once."""
    lines = read_records(path)
    found = {line["question_id"]: line for line in lines}
    if len(found) < len(lines):
        twice = [id for id, times in Counter(line["question_id"] for line in lines).items() if times > 1]
        raise ViCAError(f"{path} answers {len(twice)} questions more than once: {listed(twice)}")
    return found


def write_whole(path: Path, text: str) -> None:
    """Writes all of the text or nothing, even if the process is killed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
