"""Reports the samples that training leaves out, and ends a run that leaves out too many."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from ..utils.errors import ViCAError
from .sources import where_images_from
from .training import Broken, TrainingSet

_ENOUGH = 1000  # samples to see before a share of them means anything


class Skipped:
    """Keeps one JSON line {id, reason, record} for each broken sample in `file`.

    The ranks of a run share the file, and a resumed run continues it. `count` is its number of lines; a sample that
    breaks again, in a later epoch or after a resume, adds no line.

    Training ends once the broken samples are more than `limit_share` of `total`. If the total is not known (a stream),
    the share is taken of the samples that this rank has seen, as counted by `saw`, from 1,000 on.
    """

    def __init__(self, file: str | os.PathLike, limit_share: float, total: int | None = None):
        if not 0 <= limit_share <= 1:
            raise ViCAError(f"the share of samples that may be broken is {limit_share}; it must be from 0 to 1")
        self.file, self.limit_share, self.total = os.fspath(file), limit_share, total
        self.seen = self.own = 0
        self._known: set[Broken] = set()
        self._read = 0
        os.makedirs(os.path.dirname(self.file) or ".", exist_ok=True)
        self._catch_up()

    @property
    def count(self) -> int:
        self._catch_up()
        return len(self._known)

    def saw(self, samples: int) -> None:
        """Counts samples that passed, broken ones included."""
        self.seen += samples

    def add(self, broken: Broken) -> None:
        self.own += 1
        self._catch_up()
        if broken not in self._known:
            # A single write to a file opened for appending: lines of several ranks do not mix.
            report = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(report, _line(broken).encode())
            finally:
                os.close(report)
            self._known.add(broken)
        self._check(broken)

    def _catch_up(self) -> None:
        """Reads the lines that other ranks, or an earlier run, have written."""
        if not os.path.exists(self.file):
            return
        with open(self.file, "rb") as report:
            report.seek(self._read)
            for line in report:
                if not line.endswith(b"\n"):
                    break
                self._known.add(_parse(self.file, line))
                self._read += len(line)

    def _check(self, last: Broken) -> None:
        count, of = (self.own, self.seen) if self.total is None else (self.count, self.total)
        if count > self.limit_share * of and (self.total is not None or of >= _ENOUGH):
            raise ViCAError(
                f"{count} of {of} samples are broken, more than the {self.limit_share:.2%} allowed; "
                f"all are listed in {self.file}; the last: {last.id}: {last.reason}{where_images_from(last.reason)}"
            )


def forget_repaired(file: str | os.PathLike, data: TrainingSet) -> None:
    """Removes the samples that are no longer broken from the report, before a run starts again."""
    path = Path(file)
    if not path.exists():
        return
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    listed = {_parse(os.fspath(file), line).record for line in lines}
    again = [data[place] for place in range(len(data)) if data.samples.name(place) in listed]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(_line(item) for item in again if isinstance(item, Broken)))
    partial.replace(path)


def _line(broken: Broken) -> str:
    return json.dumps({name: value for name, value in asdict(broken).items() if value is not None}) + "\n"


def _parse(file: str, line: bytes) -> Broken:
    try:
        entry = json.loads(line)
        return Broken(entry["id"], entry["reason"], entry.get("record"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ViCAError(f"{file} holds a line that is no report of a broken sample: {line[:80]!r}") from error
