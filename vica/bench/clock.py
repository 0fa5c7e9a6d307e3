"""Times pieces of work in turn, so that no column measures the device in better conditions than another."""

import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from ..utils.errors import ViCAError

log = logging.getLogger(__name__)
Result = TypeVar("Result")

WARM_UPS = {"cuda": 3, "cpu": 1}  # a captured pass runs plainly first, then is captured, then replayed


@dataclass
class Job:
    """Work to time. `work` is timed on the result of `setup`, which is not timed. `steps` divides the time."""

    work: Callable
    setup: Callable = lambda: None
    steps: int = 1


@dataclass
class Timing:
    seconds: list[float] = field(default_factory=list)
    first_seconds: float | None = None  # the first warm-up, which compiles and captures
    tokens: list[int] | None = None  # the answer of the last run
    failure: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds and not self.failure else None


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def race(makers: dict[str, Callable[[], Job]], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Makes each column's job, warms it up and times it in turn with the others. One that fails notes why and
    leaves."""
    timings = {name: Timing() for name in makers}
    jobs: dict[str, Job] = {}
    for name, make in makers.items():
        with failures_noted(timings[name], device):
            jobs[name] = make()
    for turn in range(WARM_UPS[device.type] + repeats):
        for name in list(jobs):
            with failures_noted(timings[name], device):
                run_once(jobs[name], timings[name], turn, device)
            if timings[name].failure:
                del jobs[name]
    return timings


def run_once(job: Job, timing: Timing, turn: int, device: torch.device) -> None:
    given = job.setup()
    seconds, tokens = timed(lambda: job.work(given), device)
    # a tower's features have more dimensions
    timing.tokens = tokens.tolist() if isinstance(tokens, torch.Tensor) and tokens.dim() == 1 else None
    if turn == 0:
        timing.first_seconds = seconds
    elif turn >= WARM_UPS[device.type]:
        timing.seconds.append(seconds / job.steps)


class failures_noted:
    """Context that records one column's failure as a finding, so that the measurement goes on."""

    def __init__(self, timing: Timing, device: torch.device):
        self.timing, self.device = timing, device

    def __enter__(self):
        return self.timing

    def __exit__(self, kind, error, trace) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self.timing.failure = describe(error)
        if not isinstance(error, (ViCAError, torch.OutOfMemoryError)):
            log.error("a column failed", exc_info=(kind, error, trace))
        error.__traceback__ = None  # its frames hold the tensors that did not fit
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True


def describe(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ViCAError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@torch.no_grad()
def copy_rate(device: torch.device) -> float:
    """Returns the bytes a second, read and written, of a large plain copy."""
    size = 2**31 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_of(lambda: target.copy_(source), device)


@torch.no_grad()
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOPs a second of a large square product."""
    size = 8192 if device.type == "cuda" else 512
    x, y = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / best_of(lambda: x @ y, device)


def best_of(work: Callable, device: torch.device, rounds: int = 10, tries: int = 5) -> float:
    """Returns the seconds of one call when many are launched in sequence: the best of several tries."""
    return min(timed(lambda: [work() for _ in range(rounds)], device)[0] / rounds for _ in range(tries))
