"""Draws on all cores."""

import signal
from collections.abc import Callable, Iterator
from multiprocessing import Pool

from ..utils.progress import progress


def in_order(make: Callable[[int], object], count: int, name: str, unit: str, shown: bool = True) -> Iterator:
    """Yields `make` of 0, 1, ... count - 1 in order, computed in parallel; `shown`: with their progress on stderr."""
    with Pool(initializer=_ignore_interrupts) as pool:
        made = pool.imap(make, range(count), chunksize=64)
        yield from progress(made, count, unit, name, shown)


def _ignore_interrupts() -> None:
    """Ignores Ctrl-C in a worker: it reaches all processes, but only the first one reports it and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
