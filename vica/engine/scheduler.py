"""Continuous batching: which requests run, in which lanes, with which slots and images.

`step` lets prepared requests in (their images, then one prefill for all of them), tells the device to make every
running request's next token, and reads the tokens of the step before, so that host and device work at the same time.
A request takes all the slots it may need when it enters: what runs can always go on, and what does not fit waits.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from ..utils.errors import ViCAError
from .budget import Limits, out_of_memory
from .image_memory import FEATURES, Entry, ImageMemory
from .inputs import ImageInput, Inputs, Prepared
from .kv import Prefix
from .layout import Layout
from .request import Request, Result, Token
from .runner import Batch, Row, Runner
from .text import TextStream, cut

log = logging.getLogger(__name__)

PREFILL_ROWS = 8192  # of one pass: enough to keep any device busy, and a bound on its memory
COLDEST = 1e-6  # temperatures below draw the likeliest token whatever the noise, and overflow float32
PATIENCE = 0.05  # seconds that a prepared request waits for others to share its prefill


@dataclass(eq=False)
class Sequence:
    """A request on its way."""

    request: Request
    prepared: "Future[Prepared]"
    seed: int
    stream: TextStream | None  # None: no text is needed before the end
    sink: deque  # where it goes with a token, a result or both
    streaming: bool  # with each token
    ready: bool = False  # `prepared` is done, which is slow to ask
    submitted: float = field(default_factory=time.perf_counter)
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    admitted: float | None = None
    first_token: float | None = None
    cancelled: bool = False  # with all of its stream
    retried: bool = False  # after memory was too short for it alone
    result: Result | None = None
    # while it has a lane:
    row: Row | None = None
    launched: int = 0  # tokens that the device was told to make, those of earlier stays included
    most: int = 0  # tokens it may have
    prefix: Prefix | None = None
    makes_prefix: bool = False
    own_slots: np.ndarray | None = None  # the others are its prefix's
    entries: list[Entry] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Text rows it holds once all that was launched is done."""
        return len(self.row.slots) - (self.most - self.launched)


class NoRoom(Exception):
    """Not now: what runs must finish first."""


class Arrivals:
    """Counts requests as they are prepared, so that who waits for several of them wakes once: a thread that woke for
    each, and looked at all, would take most of the time that preparing them needs."""

    def __init__(self):
        self.changed, self.count, self.wanted = threading.Condition(), 0, 0

    def add(self, _: Future) -> None:
        with self.changed:
            self.count += 1
            if self.count >= self.wanted:
                self.changed.notify()

    def wait(self, count: int, seconds: float | None) -> None:
        """Until so many have come since the engine began, or the time is over."""
        with self.changed:
            self.wanted = count
            self.changed.wait_for(lambda: self.count >= count, seconds)


class Scheduler:
    def __init__(
        self, runner: Runner, inputs: Inputs, memory: ImageMemory, ends: set[int], max_batch: int, keep_prefix: bool
    ):
        self.runner, self.inputs, self.memory, self.ends = runner, inputs, memory, ends
        self.limits, self.keep_prefix = Limits(max_batch, PREFILL_ROWS), keep_prefix
        self.waiting: deque[Sequence] = deque()
        self.arrivals = Arrivals()
        self.active: list[Sequence] = []
        self.leaving: set[Sequence] = set()  # whose last tokens are still in flight
        self.lanes = list(range(max_batch, 0, -1))  # lane 0 is the runner's
        self.in_flight: deque[tuple[torch.Tensor, object, list[Sequence]]] = deque()
        self.batch: Batch | None = None
        self.entered = 0.0  # when requests last entered

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active or self.in_flight)

    def step(self) -> None:
        """One pass stays in flight while there is a next to launch. Where nothing runs, passes are read one a step:
        what has been prepared meanwhile enters behind those that are left, and the device goes on."""
        self.drop_cancelled()
        self._decode()
        entered = self._admit(self._choose())
        while len(self.in_flight) > bool(self.active or entered):
            self._harvest()
            if self.waiting and not self.active:
                break

    # --- entering ---

    def _choose(self) -> list[Sequence]:
        """Prepared requests to let in now. A few at a time would read all weights for little, so they wait for each
        other as long as others run, and for a moment if none does."""
        free = max(0, min(len(self.lanes), self.limits.requests - len(self.active)))
        if self.active or self.in_flight:
            wanted = min(len(self.waiting), max(1, self.limits.requests // 4))
            if not wanted or not free:
                return []
            ready = self._ready()
            patient = not ready or time.perf_counter() - max(ready[0].submitted, self.entered) < PATIENCE
            return [] if min(len(ready), free) < wanted and patient else ready[:free]
        wanted, deadline = min(len(self.waiting), free), None
        while True:
            come, ready, now = self.arrivals.count, self._ready(), time.perf_counter()
            deadline = deadline or (now + PATIENCE if ready else None)
            if len(ready) >= wanted or (deadline is not None and now >= deadline):
                return ready[:free]
            # `come` is older than `ready`: who came in between is in both, and waiting ends too early, but never late.
            missing = wanted - len(ready) if ready else 1
            self.arrivals.wait(come + missing, deadline and deadline - now)

    def _ready(self) -> list[Sequence]:
        for sequence in self.waiting:
            sequence.ready = sequence.ready or sequence.prepared.done()
        return [sequence for sequence in self.waiting if sequence.ready]

    def _admit(self, chosen: list[Sequence]) -> bool:
        """Whether any entered."""
        entering: list[Sequence] = []
        try:
            self._take_each(chosen, entering)
        except BaseException:  # an interrupt: those taken are in no other list
            self._send_back(entering)
            raise
        return bool(entering) and self._enter(entering)

    def _take_each(self, chosen: list[Sequence], entering: list[Sequence]) -> None:
        rows = 0
        for sequence in chosen:
            if (error := sequence.prepared.exception()) is not None:  # not raised here: it would hold its sequence
                self._fail(sequence, error)
                continue
            try:
                prepared = sequence.prepared.result()
                layout = prepared.layout.continued(sequence.tokens)
                if entering and rows + len(layout) > self.limits.rows:
                    break
                self._take(sequence, layout, prepared)
            except NoRoom:
                break
            except Exception as error:
                self._fail(sequence, error)
                continue
            entering.append(sequence)
            rows += len(layout) - sequence.row.held

    def _take(self, sequence: Sequence, layout: Layout, prepared: Prepared) -> None:
        """Gives the sequence a lane, slots and its images' entries, or nothing at all."""
        runner, request = self.runner, sequence.request
        if layout.total > runner.width:
            raise ViCAError(f"the prompt takes {layout.total} positions, the model has {runner.width}")
        done = len(sequence.tokens)
        # int and float: numpy's small numbers would overflow in what is made of them
        sequence.most = min(int(request.max_new_tokens), done + runner.width - layout.total + 1)
        try:
            slots, held = self._take_slots(sequence, layout, len(layout) + sequence.most - done - 1)
            sequence.row = Row(layout, 0, slots, held)
            self._take_images(sequence, layout, prepared)
        except BaseException:
            self._give_back(sequence)
            raise
        if request.temperature > COLDEST:
            top_k, top_p = min(int(request.top_k), 2**31), float(request.top_p)
            sequence.row.sampling = (float(request.temperature), top_k, top_p, int(sequence.seed))
        sequence.row.lane = self.lanes.pop()
        sequence.launched, sequence.prompt_tokens = done, prepared.layout.total
        self.waiting.remove(sequence)

    def _take_slots(self, sequence: Sequence, layout: Layout, rows: int) -> tuple[np.ndarray, int]:
        """Slots of all rows, and how many of the first are others' work."""
        pool, count = self.runner.pool, layout.prefix if self.keep_prefix else 0
        key = (bool(layout.images), *layout.ids[:count].tolist())
        prefix = pool.find_prefix(key) if count else None
        if prefix is not None:
            prefix.users += 1
            sequence.prefix = prefix
        need = rows - (count if prefix else 0)
        if rows > pool.slots:
            raise ViCAError(
                f"the request may take {rows} rows of text K/V, kv_bytes is room for {pool.slots}: ask for fewer "
                "max_new_tokens, or give more"
            )
        if not pool.can_take(need):
            raise NoRoom
        slots = pool.take(need)
        if prefix is not None:
            sequence.own_slots = slots
            return np.concatenate([prefix.slots, slots]), count
        sequence.own_slots = slots[count:]
        if count:
            sequence.prefix, sequence.makes_prefix = Prefix(slots[:count], users=1), True
            pool.prefixes[key] = sequence.prefix
        return slots, 0

    def _take_images(self, sequence: Sequence, layout: Layout, prepared: Prepared) -> None:
        sizes = [self.runner.image_bytes(image.size) for image in prepared.images]
        if sum(sizes) > self.memory.limit:
            raise ViCAError(f"the request's images take {sum(sizes)} bytes, image_memory_bytes is {self.memory.limit}")
        for image, source, place, size in zip(prepared.images, prepared.sources, layout.images, sizes):
            start = place.start if self.runner.images_are_kv else FEATURES
            if self.memory.find(image.key, start) is None:
                self._hold(image, source)
            if (entry := self.memory.acquire(image.key, start, size)) is None:
                raise NoRoom
            sequence.entries.append(entry)

    def _hold(self, image: ImageInput, source) -> None:
        """What an entry will be made of, held whatever is evicted until then. An image that the memory had when it was
        prepared may be gone by now, and its file too: that is its request's failure alone."""
        if image.features is None:
            known = self.memory.find(image.key)
            if known is not None and known.tensor is not None:
                image.features = known.tensor
            elif self.inputs.load(image, source) is not image:
                raise ViCAError(f"image {os.fspath(source)!r} has changed while its request waited")

    def _enter(self, entering: list[Sequence]) -> bool:
        try:
            tokens = unless_out_of_memory(lambda: self._first_tokens(entering))
        except BaseException:
            self._send_back(entering)
            raise
        if tokens is None:
            self._retreat(entering)
            return False
        self.entered = now = time.perf_counter()
        for sequence in entering:
            sequence.admitted = sequence.admitted or now
            sequence.makes_prefix = False
        self.active += entering
        self.batch = None
        self._launched(tokens, entering)
        return True

    def _first_tokens(self, entering: list[Sequence]) -> torch.Tensor:
        self._compute_images(entering)
        return self.runner.prefill([s.row for s in entering])

    def _compute_images(self, entering: list[Sequence]) -> None:
        """Fills the new entries: pixels to features, features to K/V."""
        new = {}
        for sequence in entering:
            for image, entry in zip(sequence.prepared.result().images, sequence.entries):
                if entry.tensor is None:
                    new.setdefault(entry, image)
        features = self._features({image.key: image for image in new.values()})
        tensors = [features[entry.key] for entry in new]
        if self.runner.images_are_kv:
            tensors = self.runner.image_kv(tensors, [entry.start for entry in new])
        for entry, tensor in zip(new, tensors):
            entry.tensor = tensor
        for sequence in entering:
            sequence.row.images = [entry.tensor for entry in sequence.entries]
            for image in sequence.prepared.result().images:  # large, and of no more use
                image.pixels = image.features = None
        self.memory.misses += len(new)
        self.memory.hits += sum(len(s.entries) for s in entering) - len(new)

    def _features(self, images: dict[str, ImageInput]) -> dict[str, torch.Tensor]:
        held = {key: image.features for key, image in images.items() if image.features is not None}
        found = {key: x.to(self.runner.device, self.runner.dtype) for key, x in held.items()}
        pixels = {key: image.pixels for key, image in images.items() if key not in found}
        if pixels:
            found |= dict(zip(pixels, self.runner.encode(np.stack(list(pixels.values())))))
        if self.runner.images_are_kv:
            for key, features in found.items():
                self.memory.offer(key, FEATURES, features)
        return found

    # --- running ---

    def _decode(self) -> None:
        """Launches the next token of every running sequence."""
        running = list(self.active)
        if not running:
            return
        if self.batch is None:
            self.batch = self.runner.batch([s.row for s in running])
        longest = max(s.length for s in running)
        tokens = unless_out_of_memory(lambda: self.runner.decode(self.batch, longest))
        if tokens is None:
            self._thin_out(running)
            return
        for sequence in running:
            sequence.retried = False
        self._launched(tokens, running)

    def _launched(self, tokens: torch.Tensor, sequences: list[Sequence]) -> None:
        """A sequence whose last token is on its way has no use for its lane, slots and images: whatever others do with
        them, the device does later."""
        self.limits.a_pass_went_well()
        for sequence in sequences:
            sequence.launched += 1
            if sequence.launched == sequence.most:
                self._leave(sequence)
                self.leaving.add(sequence)
        self.active = [s for s in self.active if s.row is not None]
        event = None
        if tokens.device.type == "cuda":
            tokens = tokens.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.in_flight.append((tokens, event, sequences))

    def _harvest(self) -> None:
        tokens, event, sequences = self.in_flight.popleft()
        if event is not None:
            event.synchronize()
        now = time.perf_counter()
        for sequence, token in zip(sequences, tokens.tolist()):
            if sequence.result is None:  # else it ended while the device was a step ahead
                sequence.first_token = sequence.first_token or now
                self._accept(sequence, token)

    def _accept(self, sequence: Sequence, token: int) -> None:
        request, stream = sequence.request, sequence.stream
        sequence.tokens.append(token)
        ended = token in self.ends and not request.ignore_eos
        piece = "" if stream is None else stream.push(token)
        stopped = stream is not None and stream.stopped
        full = len(sequence.tokens) >= sequence.most
        if stream is not None and (ended or full):
            piece += stream.finish()
        if ended or stopped or full:
            self._finish(sequence, "stop" if ended or stopped else "length", Token(token, piece))
        elif sequence.streaming:
            sequence.sink.append((sequence, Token(token, piece), None))

    # --- leaving ---

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        """Whatever one request's content raises, the others go on."""
        if not isinstance(error, ViCAError):
            log.error("a request failed while it was prepared", exc_info=error)
        self._finish(sequence, "error", error=" ".join(str(error).split()) or type(error).__name__)

    def _finish(self, sequence: Sequence, reason: str, last: Token | None = None, error: str | None = None) -> None:
        now = time.perf_counter()
        started, first = sequence.admitted or now, sequence.first_token
        sequence.result = Result(
            sequence.request.id,
            self._text(sequence),
            list(sequence.tokens),
            reason,
            error,
            prompt_tokens=sequence.prompt_tokens,
            queued_s=started - sequence.submitted,
            first_token_s=None if first is None else first - sequence.submitted,
            total_s=now - sequence.submitted,
        )
        sequence.sink.append((sequence, last, sequence.result))
        if sequence in self.leaving:
            self.leaving.remove(sequence)
        elif sequence in self.active:
            self.active.remove(sequence)
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
            sequence.prepared.cancel()

    def _text(self, sequence: Sequence) -> str:
        if not sequence.tokens or self.inputs.processor is None:
            return ""
        text = self.inputs.processor.decode(sequence.tokens, skip_special_tokens=True)
        return cut(text, sequence.request.stops)[0].strip()

    def _leave(self, sequence: Sequence) -> None:
        self.lanes.append(sequence.row.lane)
        self._give_back(sequence)
        self.batch = None

    def _give_back(self, sequence: Sequence) -> None:
        pool = self.runner.pool
        if sequence.own_slots is not None:
            pool.give(sequence.own_slots)
        if sequence.prefix is not None:
            sequence.prefix.users -= 1
            if sequence.makes_prefix:  # it was never computed
                pool.forget(sequence.prefix)
        for entry in sequence.entries:
            self.memory.release(entry)
        sequence.row = sequence.own_slots = sequence.prefix = None
        sequence.makes_prefix, sequence.entries = False, []

    def drop_cancelled(self) -> None:
        known = (*self.waiting, *self.active, *self.leaving)
        for sequence in [s for s in known if s.cancelled or s.request.cancelled]:
            self._finish(sequence, "cancelled")
        if (
            not self.active and not self.leaving
        ):  # what is still in flight is nobody's, and would keep its requests alive
            self.in_flight.clear()

    # --- out of memory ---

    def _retreat(self, entering: list[Sequence]) -> None:
        """An entry that did not fit is tried again with half as many rows; a single request when half of what runs
        has left, or where nothing runs when the passes in flight have been read."""
        rows = sum(len(s.row.layout) - s.row.held for s in entering)
        log.warning("out of memory while %d requests entered with %d rows", len(entering), rows)
        self._send_back(entering)
        self._free_memory()
        if len(entering) > 1:
            self.limits.lower(rows=rows // 2)
        elif self.active:
            self.limits.lower(requests=len(self.active) // 2)
        elif not self.in_flight:
            self._fail_second_time(entering[0])

    def _thin_out(self, running: list[Sequence]) -> None:
        """After a step that did not fit at most half as many run. All enter again with their answers so far: a step
        that failed may have moved the lanes on already."""
        while self.in_flight:
            self._harvest()
        log.warning("out of memory in a step of %d requests: at most half as many for now", len(running))
        left = [s for s in running if s.result is None]
        for sequence in left:
            self.active.remove(sequence)
        self._send_back(left)
        self._free_memory()
        self.limits.lower(requests=len(running) // 2)
        if len(running) == 1 and left:
            self._fail_second_time(left[0])

    def _send_back(self, sequences: list[Sequence]) -> None:
        """They wait again, before all others."""
        for sequence in reversed(sequences):
            self._leave(sequence)
            self.waiting.appendleft(sequence)

    def _fail_second_time(self, sequence: Sequence) -> None:
        if sequence.retried:
            self._finish(sequence, "error", error="out of memory, even alone")
        sequence.retried = True

    def _free_memory(self) -> None:
        self.memory.clear()
        self.runner.graphs.clear()
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()


def unless_out_of_memory(work: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """None leaves nothing behind: an error that is still being handled holds the tensors of the pass that failed."""
    try:
        return work()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
