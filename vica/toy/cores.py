"""Draws pictures on all cores."""

import signal
from collections.abc import Callable, Iterator
from multiprocessing import Pool

from tqdm import tqdm


def in_order(make: Callable[[int], object], count: int, name: str, unit: str, progress: bool = True) -> Iterator:
    """`make` of 0, 1, ... count - 1, made at the same time; with a progress bar on a terminal."""
    with Pool(initializer=_ignore_interrupts) as pool:
        made = pool.imap(make, range(count), chunksize=64)
        yield from tqdm(made, name, count, unit=f" {unit}", disable=None if progress else True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes; the first one alone speaks, and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
