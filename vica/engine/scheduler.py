"""Batch continuously: each step lets prepared requests in, launches every running request's next token, and reads the
tokens of the step before."""

from .admission import Admission
from .budget import Limits
from .flight import Flight
from .image_memory import ImageMemory
from .inputs import Inputs
from .recovery import Recovery
from .runner import Runner
from .sequence import Sequence, State

PREFILL_TOKENS = 8192  # most in one pass: enough to keep any device busy, and a bound on its memory


class Scheduler:
    """`ends`: token ids that end an answer. `keep_prefix`: whether shared prefixes outlive their requests."""

    def __init__(
        self, runner: Runner, inputs: Inputs, memory: ImageMemory, ends: set[int], max_batch: int, keep_prefix: bool
    ) -> None:
        self.limits = Limits(max_batch, PREFILL_TOKENS)
        self.admission = Admission(runner, inputs.images, memory, self.limits, max_batch, keep_prefix)
        self.flight = Flight(runner, memory, self.admission, self.limits, ends)
        self.recovery = Recovery(runner, memory, self.admission, self.flight, self.limits)

    @property
    def waiting(self) -> int:
        """The number of requests that have not entered."""
        return len(self.admission.waiting)

    @property
    def running(self) -> int:
        """The number of requests that hold a batch slot."""
        return len(self.flight.active)

    @property
    def busy(self) -> bool:
        return bool(self.admission.waiting or self.flight.active or self.flight.passes)

    def submit(self, sequence: Sequence) -> None:
        """Makes the sequence wait, from when its preparation has begun."""
        sequence.prepared.add_done_callback(self.admission.arrivals.add)
        self.admission.waiting.append(sequence)

    def step(self) -> None:
        """Goes one step on. One pass stays in flight while there is a next one to launch. Where nothing runs, passes
        are read one a step: requests that were prepared meanwhile enter behind those left, and the device goes on."""
        self.drop_cancelled()
        self._decode()
        entered = self._admit()
        flight = self.flight
        while len(flight.passes) > bool(flight.active or entered):
            flight.harvest()
            if self.admission.waiting and not flight.active:
                break

    def _decode(self) -> None:
        if self.flight.active and not self.flight.decode():
            self.recovery.preempt_half(list(self.flight.active))

    def _admit(self) -> bool:
        """Returns whether any request entered."""
        chosen = self.admission.choose(len(self.flight.active), bool(self.flight.passes))
        entering: list[Sequence] = []
        try:
            self.admission.take_each(chosen, entering)
            if not entering:
                return False
            tokens = self.flight.prefill(entering)
        except BaseException:  # an interrupt among them: no other list holds those that were taken
            self.recovery.requeue(entering)
            raise
        if tokens is None:
            self.recovery.retry_smaller(entering)
            return False
        self.flight.enter(entering, tokens)
        return True

    def drop_cancelled(self) -> None:
        """Ends the sequences that were cancelled, wherever they are."""
        known = (*self.admission.waiting, *self.flight.active, *self.flight.draining)
        for sequence in [s for s in known if s.cancelled or s.request.cancelled]:
            if sequence.state is State.WAITING:
                self.admission.finish(sequence, "cancelled")
            else:
                self.flight.finish(sequence, "cancelled")
        if not self.flight.active and not self.flight.draining:
            self.flight.passes.clear()  # no sequence waits for their tokens, and they would keep requests alive
