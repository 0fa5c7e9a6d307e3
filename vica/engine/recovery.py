"""Go on when memory is too short for a pass: fewer tokens enter, or fewer requests run; no answer is lost.

Requests that gave way wait again, before all others, and enter with their answers so far.
"""

import logging

import torch

from .admission import Admission
from .budget import Limits
from .flight import Flight
from .image_memory import ImageMemory
from .runner import Runner
from .sequence import Sequence, State

log = logging.getLogger(__name__)


class Recovery:
    def __init__(
        self, runner: Runner, memory: ImageMemory, admission: Admission, flight: Flight, limits: Limits
    ) -> None:
        self.runner, self.memory, self.admission, self.flight, self.limits = runner, memory, admission, flight, limits

    def retry_smaller(self, entering: list[Sequence]) -> None:
        """After a prefill that did not fit: several requests are tried again with half as many tokens. A single one is
        tried again when half of what runs has left, or where nothing runs when the passes in flight have been read."""
        tokens = sum(len(s.running.layout) - s.running.shared for s in entering)
        log.warning("out of memory while %d requests entered with %d rows", len(entering), tokens)
        self.requeue(entering)
        self.free_memory()
        if len(entering) > 1:
            self.limits.lower(tokens=tokens // 2)
        elif self.flight.active:
            self.limits.lower(requests=len(self.flight.active) // 2)
        elif not self.flight.passes:
            self._fail_second_time(entering[0])

    def preempt_half(self, running: list[Sequence]) -> None:
        """After a decode step that did not fit: at most half as many requests run. All enter again, because the step
        may have changed the device's state of their batch slots before it failed."""
        while self.flight.passes:
            self.flight.harvest()
        log.warning("out of memory in a step of %d requests: at most half as many for now", len(running))
        left = [s for s in running if s.state is State.RUNNING]
        for sequence in left:
            self.flight.active.remove(sequence)
        self.requeue(left)
        self.free_memory()
        self.limits.lower(requests=len(running) // 2)
        if len(running) == 1 and left:
            self._fail_second_time(left[0])

    def requeue(self, sequences: list[Sequence]) -> None:
        """Makes sequences that were taken in wait again, before all others."""
        for sequence in reversed(sequences):
            self.flight.release(sequence)
        self.admission.put_back(sequences)

    def free_memory(self) -> None:
        """Gives back what is kept only for speed."""
        self.memory.clear()
        self.runner.graphs.clear()
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()

    def _fail_second_time(self, sequence: Sequence) -> None:
        if sequence.retried:
            self.admission.finish(sequence, "error", "out of memory, even alone")
        sequence.retried = True
