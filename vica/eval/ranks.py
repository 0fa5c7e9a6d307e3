"""Several processes, one a GPU, on one machine or many: which questions are whose, and how answers come together."""

import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..utils.errors import ViCAError
from .task import Question

PATIENCE = timedelta(days=7)  # one process may be done long before another


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, wanted: str | None) -> str | None:
        """This process's own card, where no other is `wanted`; None leaves the choice to who loads the model."""
        own = self.world > 1 and torch.cuda.is_available() and wanted in (None, "cuda")
        return f"cuda:{self.local}" if own else wanted

    def share(self, questions: Sequence[Question]) -> list[Question]:
        """This process's questions, those about one image one after another: it is encoded once."""
        groups: dict[Any, list[Question]] = {}
        for place, question in enumerate(questions):
            groups.setdefault(place if question.image_key is None else question.image_key, []).append(question)
        return [question for group in list(groups.values())[self.rank :: self.world] for question in group]

    def gather(self, value) -> list | None:
        """Everybody's values, for the first; the others get None."""
        if self.world == 1:
            return [value]
        gathered = [None] * self.world if self.first else None
        with self._together():
            dist.gather_object(value, gathered)
        return gathered

    def wait(self) -> None:
        if self.world > 1:
            with self._together():
                dist.barrier()

    @contextmanager
    def _together(self):
        """Gloo's words for a process that has gone, a traceback of its own, would hide what that one had to say."""
        try:
            yield
        except RuntimeError as error:
            raise ViCAError(
                f"process {self.rank + 1} of {self.world} stops, because another one has, and said why: {error}"
            ) from error


@contextmanager
def all_ranks():
    """The processes that torchrun started; without it, this one alone."""
    rank, world, local = (
        int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if world == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(rank, world, local)
    finally:
        dist.destroy_process_group()
