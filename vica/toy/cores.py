"""Draws on all cores."""

import signal
from collections.abc import Callable, Iterator
from multiprocessing import Pool

from tqdm import tqdm


def in_order(make: Callable[[int], object], count: int, name: str, unit: str, progress: bool = True) -> Iterator:
    """Yields `make` of 0, 1, ... count - 1 in order, computed in parallel; with a progress bar on a terminal."""
    with Pool(initializer=_ignore_interrupts) as pool:
        made = pool.imap(make, range(count), chunksize=64)
        yield from tqdm(made, name, count, unit=f" {unit}", disable=None if progress else True)


def _ignore_interrupts() -> None:
    """Ignores Ctrl-C in a worker: it reaches all processes, but only the first one reports it and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
