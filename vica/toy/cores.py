"""Drawing by all cores."""

import signal
from collections.abc import Callable, Iterator
from multiprocessing import Pool

from ..utils.progress import progress


def in_order(make: Callable[[int], object], count: int, name: str, unit: str, shown: bool = True) -> Iterator:
    """`make` of 0, 1, ... count - 1, made at the same time; `shown`: with their progress on stderr."""
    with Pool(initializer=_ignore_interrupts) as pool:
        made = pool.imap(make, range(count), chunksize=64)
        yield from progress(made, count, unit, name, shown)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes; the first one alone speaks, and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
