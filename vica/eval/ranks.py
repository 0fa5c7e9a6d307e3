"""Several processes, one a GPU, on one or many machines: shares the questions among them and gathers the answers."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..utils.errors import ViCAError
from .task import Question

TIMEOUT = timedelta(days=7)  # one process may finish long before another


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, wanted: str | None) -> str | None:
        """Returns this process's own card unless another device is `wanted`; None leaves the choice to the loader."""
        own = self.world > 1 and torch.cuda.is_available() and wanted in (None, "cuda")
        return f"cuda:{self.local}" if own else wanted

    def share(self, questions: Sequence[Question]) -> list[Question]:
        """Returns this process's questions. Those about one image follow each other, so that it is encoded once."""
        groups: dict[Any, list[Question]] = {}
        for place, question in enumerate(questions):
            groups.setdefault(place if question.image_key is None else question.image_key, []).append(question)
        return [question for group in list(groups.values())[self.rank :: self.world] for question in group]

    def gather(self, value) -> list | None:
        """Returns the values of all processes to the first; the others get None."""
        if self.world == 1:
            return [value]
        gathered = [None] * self.world if self.first else None
        with self._explained():
            dist.gather_object(value, gathered)
        return gathered

    def wait(self) -> None:
        if self.world > 1:
            with self._explained():
                dist.barrier()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Runs the body in the first process, and then in all others, which find the first one's files."""
        self.wait()
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()
        self.wait()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Replaces Gloo's error about a process that has gone: its traceback would hide the message of that process."""
        try:
            yield
        except RuntimeError as error:
            raise ViCAError(
                f"process {self.rank + 1} of {self.world} stops, because another one has, and said why: {error}"
            ) from error


@contextmanager
def all_ranks():
    """Joins the processes that torchrun started; without it, this process alone."""
    rank, world, local = (
        int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if world == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(rank, world, local)
    finally:
        dist.destroy_process_group()
