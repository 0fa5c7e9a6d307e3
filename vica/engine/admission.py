"""Admit requests: choose who enters next, take what a request holds while it runs, give it back.

A request takes all the K/V indices it may ever need when it enters. A running request can therefore always go on, and a
request without room waits.
"""

import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

import numpy as np

from ..model.prompt import PromptLayout
from ..utils.errors import ViCAError
from .budget import Limits
from .image_memory import FEATURES, ImageMemory
from .image_store import ImageContent, ImageStore
from .kv import SharedPrefix
from .passes import RunningPrompt
from .request import Request
from .runner import Runner
from .sequence import Sequence, State

log = logging.getLogger(__name__)

MIN_TEMPERATURE = 1e-6  # at lower ones the likeliest token wins whatever the noise, and float32 overflows
BATCHING_DELAY = 0.05  # seconds that a prepared request waits for others to share its prefill


class NoRoom(Exception):
    """Nothing is wrong with the request, but running ones must finish first."""


class Arrivals:
    """Counts prepared requests, and wakes the waiting thread once N are ready, instead of once per request: looking at
    all requests for each would take most of the time that preparing them needs."""

    def __init__(self) -> None:
        self.changed, self.count, self.wanted = threading.Condition(), 0, 0

    def add(self, _: "Future[Any]") -> None:
        with self.changed:
            self.count += 1
            if self.count >= self.wanted:
                self.changed.notify()

    def wait(self, count: int, seconds: float | None) -> None:
        """Returns when so many have come since the engine began, or after the time."""
        with self.changed:
            self.wanted = count
            self.changed.wait_for(lambda: self.count >= count, seconds)


class Admission:
    """Owns the waiting sequences and the free batch slots."""

    def __init__(
        self,
        runner: Runner,
        images: ImageStore,
        memory: ImageMemory,
        limits: Limits,
        max_batch: int,
        keep_prefix: bool,
    ) -> None:
        self.runner, self.images, self.memory, self.limits = runner, images, memory, limits
        self.keep_prefix = keep_prefix
        self.waiting: deque[Sequence] = deque()
        self.free_batch_slots = list(range(max_batch, 0, -1))  # slot 0 is the padding's
        self.arrivals = Arrivals()
        self.last_entry = 0.0  # when requests last entered

    # --- choose ---

    def choose(self, running: int, in_flight: bool) -> list[Sequence]:
        """Returns prepared requests to let in now. Few at a time would read all weights for little, so they wait for
        each other as long as others run, and for a moment if none does."""
        free = max(0, min(len(self.free_batch_slots), self.limits.requests - running))
        if running or in_flight:
            return self._choose_beside_others(free)
        return self._wait_for_a_batch(free)

    def _choose_beside_others(self, free: int) -> list[Sequence]:
        wanted = min(len(self.waiting), max(1, self.limits.requests // 4))
        if not wanted or not free:
            return []
        ready = self._prepared()
        if min(len(ready), free) >= wanted:
            return ready[:free]
        waits = not ready or time.perf_counter() - max(ready[0].submitted, self.last_entry) < BATCHING_DELAY
        return [] if waits else ready[:free]

    def _wait_for_a_batch(self, free: int) -> list[Sequence]:
        """Blocks until as many as may enter are prepared, or for BATCHING_DELAY after the first."""
        wanted = min(len(self.waiting), free)
        deadline: float | None = None
        while True:
            arrived, ready, now = self.arrivals.count, self._prepared(), time.perf_counter()
            deadline = deadline or (now + BATCHING_DELAY if ready else None)
            if len(ready) >= wanted or (deadline is not None and now >= deadline):
                return ready[:free]
            # `arrived` is older than `ready`: an arrival in between counts twice. Waiting then ends early, never late.
            missing = wanted - len(ready) if ready else 1
            self.arrivals.wait(arrived + missing, None if deadline is None else deadline - now)

    def _prepared(self) -> list[Sequence]:
        for sequence in self.waiting:
            sequence.is_prepared = sequence.is_prepared or sequence.prepared.done()
        return [sequence for sequence in self.waiting if sequence.is_prepared]

    # --- take ---

    def take_each(self, chosen: list[Sequence], entering: list[Sequence]) -> None:
        """Adds to `entering` the chosen sequences that find room and fit one pass. They leave `waiting`, and are
        RUNNING. The list is the caller's, so that it knows them even after an interrupt."""
        tokens = 0
        for sequence in chosen:
            failure = sequence.prepared.exception()  # raising it here would make its traceback hold the sequence
            if failure is not None:
                self.fail(sequence, failure)
                continue
            try:
                layout = sequence.prepared.result().layout.continued(sequence.tokens)
                if entering and tokens + len(layout) > self.limits.tokens:
                    break
                self._take(sequence, layout)
            except NoRoom:
                break
            except Exception as error:
                self.fail(sequence, error)
                continue
            entering.append(sequence)
            tokens += len(layout) - sequence.running.shared

    def _take(self, sequence: Sequence, layout: PromptLayout) -> None:
        """Gives the sequence a batch slot, K/V indices and its images' entries, or nothing at all."""
        runner, request, done = self.runner, sequence.request, len(sequence.tokens)
        if layout.total > runner.width:
            raise ViCAError(f"the prompt takes {layout.total} positions, the model has {runner.width}")
        # int(): numpy's small integers would overflow in sums.
        sequence.max_tokens = min(int(request.max_new_tokens), done + runner.width - layout.total + 1)
        try:
            kv_index, shared = self._take_kv(sequence, layout, len(layout) + sequence.max_tokens - done - 1)
            sequence.prompt = RunningPrompt(layout, 0, kv_index, shared)
            self._take_images(sequence, layout)
        except BaseException:
            self._give_back(sequence)
            raise
        sequence.prompt.sampling = sampling_of(request, sequence.seed)
        sequence.prompt.batch_slot = self.free_batch_slots.pop()
        sequence.launched, sequence.prompt_tokens = done, sequence.prepared.result().layout.total
        self.waiting.remove(sequence)
        sequence.state = State.RUNNING

    def _take_kv(self, sequence: Sequence, layout: PromptLayout, tokens: int) -> tuple[np.ndarray, int]:
        """Returns K/V indices for all tokens, and how many leading ones a shared prefix has filled or fills."""
        pool, count = self.runner.pool, layout.prefix if self.keep_prefix else 0
        # An image behind the prefix belongs to the key: it may freeze the prefix, which gives other K/V.
        key = (bool(layout.images), *layout.ids[:count].tolist())
        prefix = pool.find_prefix(key) if count else None
        if prefix is not None:
            prefix.users += 1
            sequence.prefix = prefix
        missing = tokens - (count if prefix else 0)
        if tokens > pool.size:
            raise ViCAError(
                f"the request may take {tokens} rows of text K/V, kv_bytes is room for {pool.size}: ask for fewer "
                "max_new_tokens, or give more"
            )
        if not pool.can_take(missing):
            raise NoRoom
        kv_index = pool.take(missing)
        if prefix is not None:
            sequence.own_kv = kv_index
            return np.concatenate([prefix.kv_index, kv_index]), count
        sequence.own_kv = kv_index[count:]
        if count:
            sequence.prefix, sequence.computes_prefix = SharedPrefix(kv_index[:count], users=1), True
            pool.prefixes[key] = sequence.prefix
        return kv_index, 0

    def _take_images(self, sequence: Sequence, layout: PromptLayout) -> None:
        images = sequence.prepared.result().images
        sizes = [self.runner.image_bytes(image.size) for image in images]
        if sum(sizes) > self.memory.limit:
            raise ViCAError(f"the request's images take {sum(sizes)} bytes, image_memory_bytes is {self.memory.limit}")
        for image, place, size in zip(images, layout.images, sizes):
            start = place.start if self.runner.images_are_kv else FEATURES
            if self.memory.find(image.key, start) is None:
                self.hold_content(image)
            if (entry := self.memory.acquire(image.key, start, size)) is None:
                raise NoRoom
            sequence.entries.append(entry)

    def hold_content(self, image: ImageContent) -> None:
        """Makes the request hold what the image's new entry is computed from, whatever the memory evicts until then.

        The memory may have evicted an image that it knew when the request was prepared. The image is then loaded now;
        if its file has gone or changed, this request fails and no other.
        """
        if image.loaded.features is not None:
            return
        stored = self.memory.find(image.key)
        if stored is not None and stored.tensor is not None:
            image.loaded.features = stored.tensor
            return
        key = image.key
        self.images.load(image)
        if image.key != key:
            raise ViCAError(f"image {os.fspath(image.source)!r} has changed while its request waited")

    def confirm(self, entered: list[Sequence]) -> None:
        """Notes that the pass of these sequences was launched: their shared prefixes are as good as computed."""
        self.last_entry = now = time.perf_counter()
        for sequence in entered:
            sequence.admitted = sequence.admitted or now
            sequence.computes_prefix = False

    # --- give back ---

    def release(self, sequence: Sequence) -> None:
        """Takes everything back from a RUNNING sequence. The device does later what others launch with it."""
        self.free_batch_slots.append(sequence.running.batch_slot)
        self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        pool = self.runner.pool
        if sequence.own_kv is not None:
            pool.give(sequence.own_kv)
        if sequence.prefix is not None:
            sequence.prefix.users -= 1
            if sequence.computes_prefix:  # no pass has computed it
                pool.forget(sequence.prefix)
        for entry in sequence.entries:
            self.memory.release(entry)
        sequence.prompt = sequence.own_kv = sequence.prefix = None
        sequence.computes_prefix, sequence.entries = False, []

    def put_back(self, sequences: list[Sequence]) -> None:
        """Makes sequences that have given everything back wait again, before all others."""
        for sequence in reversed(sequences):
            sequence.state = State.WAITING
            self.waiting.appendleft(sequence)

    # --- end without running ---

    def fail(self, sequence: Sequence, error: BaseException) -> None:
        """Ends a waiting sequence with an error, whatever its content raised; the others go on."""
        if not isinstance(error, ViCAError):
            log.error("a request failed while it was prepared", exc_info=error)
        self.finish(sequence, "error", " ".join(str(error).split()) or type(error).__name__)

    def finish(self, sequence: Sequence, reason: str, error: str | None = None) -> None:
        """Ends a waiting sequence."""
        self.waiting.remove(sequence)
        sequence.prepared.cancel()
        sequence.finish(reason, error=error)


def sampling_of(request: Request, seed: int) -> tuple[float, int, float, int] | None:
    """Returns how the request draws its tokens, None for greedy, as Python's numbers: numpy's small ones overflow."""
    if request.temperature <= MIN_TEMPERATURE:
        return None
    return float(request.temperature), min(int(request.top_k), 2**31), float(request.top_p), int(seed)
