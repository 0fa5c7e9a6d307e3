"""How far long work is: a bar on a terminal, elsewhere (a log, a batch job) a plain line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator

SHARE, SECONDS = 0.1, 30.0  # a line comes after so much more of the work, or after so long
SOONEST = 2.0  # seconds between lines: short work says nothing


def progress(items: Iterable, total: int | None, unit: str, name: str = "", shown: bool = True) -> Iterator:
    """Yields the items, and shows on stderr how many of `total` have passed."""
    with counter(total, unit, name, shown=shown) as passed:
        for item in items:
            yield item
            passed.update()


def counter(total: int | None, unit: str, name: str = "", done: int = 0, shown: bool = True):
    """Returns a context whose `update(n=1)` counts: tqdm's bar on a terminal, else Lines. `done` of `total` were there
    before."""
    if shown and not sys.stderr.isatty():
        return Lines(total, unit, name, done)
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=name or None, unit=f" {unit}", disable=not shown)


class Lines:
    """Counts as tqdm does, with the few of its methods that are used here, in lines such as
    "POPE: 891 of 8,910 questions (10%), 12 s"."""

    def __init__(self, total: int | None, unit: str, name: str = "", done: int = 0):
        self.total, self.unit, self.name, self.n, self.figures = total, unit, name, done, ""
        self.told, self.start = done, time.monotonic()  # `told`: what the last line said
        self.last = self.start

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        since = now - self.last
        much = self.n - self.told >= SHARE * self.total if self.total else False
        if since >= SECONDS or (much and since >= SOONEST):
            self.tell(now)

    def close(self) -> None:
        """Tells the end of work that was long enough for a line before it."""
        if self.last > self.start and self.n > self.told:
            self.tell(time.monotonic())

    def set_postfix(self, **figures) -> None:
        """Sets figures that the next lines end with."""
        self.figures = "".join(f", {name} {value}" for name, value in figures.items())

    def write(self, text: str) -> None:
        """Prints to stdout, as tqdm does, for which no bar has to be moved here."""
        print(text)

    def tell(self, now: float) -> None:
        self.told, self.last = self.n, now
        name = f"{self.name}: " if self.name else ""
        total, share = (f" of {self.total:,}", f" ({self.n / self.total:.0%})") if self.total else ("", "")
        line = f"{name}{self.n:,}{total} {self.unit}{share}, {now - self.start:.0f} s{self.figures}"
        print(line, file=sys.stderr, flush=True)
