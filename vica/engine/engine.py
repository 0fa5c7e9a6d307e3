"""The engine: requests in any number and mix, answered in continuous batches.

engine = Engine(model, processor)
results = engine.generate([Request.ask("What is this?", ["a.jpg"]), ...])
for request, token in engine.stream(requests): ...
"""

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from ..kernels.weights import check_plain
from ..model.generation import PLAIN
from ..model.llava import ViCAForConditionalGeneration
from ..plan.layer import is_uniform
from ..plan.sizes import visual_tokens
from ..utils.errors import ViCAError
from ..utils.hashing import fingerprint
from ..utils.progress import counter
from .budget import Budget
from .image_memory import ImageMemory
from .inputs import Inputs
from .request import Request, Result, Token
from .runner import Runner
from .scheduler import Scheduler, Sequence
from .text import TextStream

log = logging.getLogger(__name__)

AHEAD = 2  # batches of requests that are prepared before they are let in


class Engine:
    """`kv_bytes` bounds the K/V of text, `image_memory_bytes` what is held of images; both default to shares of the
    card's free memory, on a CPU to 1 GiB each. `keep_prefix` and `keep_images` False: nothing outlives its request.

    The model's weights are fused in place: it stays usable, but must not be moved or changed while the engine lives.
    """

    def __init__(
        self,
        model,
        processor=None,
        *,
        max_batch: int | None = None,
        kv_bytes: int | None = None,
        image_memory_bytes: int | None = None,
        keep_prefix: bool = True,
        keep_images: bool = True,
        cuda_graphs: bool = True,
        workers: int | None = None,
    ):
        if not isinstance(model, ViCAForConditionalGeneration):
            raise ViCAError(f"the engine runs a ViCAForConditionalGeneration, not a {type(model).__name__}")
        if model.config.variant not in ("accel", "dense"):
            raise ViCAError(f"the engine runs variants accel and dense, not {model.config.variant!r}")
        if not is_uniform(model.config.plan):
            raise ViCAError(
                "the engine runs plans with the same visual tokens in every layer, and this model's plan mixes or "
                "drops them: use model.generate"
            )
        self.model, self.processor, self.config = model.eval(), processor, model.config
        check_plain(model.lm_head)
        budget = Budget.of(model, max_batch, kv_bytes, image_memory_bytes)
        with torch.inference_mode(False), torch.no_grad():
            self.runner = Runner(model, budget.max_batch, budget.slots, cuda_graphs)
        made_of = partial(binding, model, self.runner, processor)  # no method: nothing may hold the engine but its user
        self.image_memory = ImageMemory(budget.image_bytes, model.device, made_of, keep_images)
        self.inputs = Inputs(self.config, processor, visual_tokens(self.config), self.image_memory.knows, keep_prefix)
        self.threads = ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1), "vica-inputs")
        warn_of_ignored(model.generation_config)
        eos = model.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
        self.scheduler = Scheduler(self.runner, self.inputs, self.image_memory, ends, budget.max_batch, keep_prefix)
        self.max_batch, self.turn = budget.max_batch, threading.Lock()

    def generate(self, requests: Iterable[Request], progress: bool = False) -> list[Result]:
        """The results, in order. A request that fails says why in its result; the others are answered."""
        requests = list(requests)
        results: list[Result | None] = [None] * len(requests)
        with counter(len(requests), "answers", shown=progress) as bar:
            for place, request, _ in self._run(requests, streaming=False):
                results[place] = request.result
                bar.update()
        return results

    def results(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Each request when its `result` is there, in any order. Leaving the loop cancels the rest."""
        for _, request, _ in self._run(requests, streaming=False):
            yield request

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Token]]:
        """Tokens as they come, of all requests in any order; `request.result` is there with its last token, and of one
        that failed when the stream ends. Leaving the loop cancels the rest."""
        for _, request, token in self._run(requests, streaming=True):
            if token is not None:
                yield request, token

    def cancel(self, request: Request) -> None:
        """Its result comes with what it has so far, or where it is still to be drawn, as soon as it is."""
        request.cancelled = request.result is None

    def warm_up(self, batches: Iterable[int] = (1, 8, 64), text: int = 60) -> float:
        """Compiles and captures what batches of these sizes, with prompts of so much text, would otherwise wait for at
        first; the seconds it took. Text is less where the model's window is, and images are fewer where the image
        memory has no room beside what it holds."""
        start, vision = time.perf_counter(), self.config.vision_config
        for size in (min(size, self.max_batch) for size in batches):
            for _ in range(3):  # a captured pass runs plainly first, then it is captured, then replayed
                held = set(self.image_memory.entries)
                results = self.generate(self._strangers(size, text))
                self.image_memory.clear(set(self.image_memory.entries) - held)
                if failed := [r.error for r in results if r.error]:
                    raise ViCAError(f"warming up with {size} requests failed: {failed[0]}")
                if vision is not None:
                    with self._alone(), torch.inference_mode():
                        self.runner.encode(np.zeros((size, 3, vision.image_size, vision.image_size), np.float32))
        return time.perf_counter() - start

    def _strangers(self, count: int, text: int, answer: int = 4) -> list[Request]:
        """Requests about images that nobody has seen, in number and length as there is room for."""
        memory, visual, width = self.image_memory, max(1, self.inputs.visual_tokens), self.inputs.width
        features = visual * width * self.runner.dtype.itemsize  # kept beside the K/V that are made of them
        bytes_each = self.runner.image_bytes(visual) + (features if self.runner.images_are_kv else 0)
        positions = self.runner.width - (answer - 1)
        images = min(count, (memory.limit - memory.bytes) // bytes_each) if visual < positions else 0
        text = max(1, min(text, positions - visual if images else positions))
        word, place = min(3, self.inputs.vocabulary - 1), self.inputs.image_token
        prompt = [word] * (text // 2) + [place] * (images > 0) + [word] * (text - text // 2)
        shown = [[x] for x in torch.randn(images, visual, width)] or [[]]
        return [Request(prompt, shown[i % len(shown)], answer, ignore_eos=True) for i in range(count)]

    def _run(self, requests: Iterable[Request], streaming: bool):
        """A request's place, itself and a token, for each token when streaming and at the end, then with its result."""
        source, places, sink, more = enumerate(requests), {}, deque(), True
        scheduler = self.scheduler
        try:
            while more or places:
                while more and len(scheduler.waiting) < AHEAD * self.max_batch:
                    if more := (following := next(source, None)) is not None:
                        with self._alone():
                            places[self._submit(following[1], sink, streaming)] = following[0]
                with self._alone(), torch.inference_mode():
                    scheduler.step()
                while sink:
                    sequence, token, result = sink.popleft()
                    deliver(sequence, result)
                    yield places[sequence] if result is None else places.pop(sequence), sequence.request, token
        finally:
            self._leave(places, sink)

    def _leave(self, sequences: Iterable[Sequence], sink: deque) -> None:
        """Cancels what is left. Where a stream is closed within a step, by another thread or by Python's collector, the
        next step drops it."""
        for sequence in sequences:
            sequence.cancelled = True
        if self.turn.acquire(blocking=False):
            try:
                self.scheduler.drop_cancelled()
            finally:
                self.turn.release()
        for sequence, _, result in sink:
            deliver(sequence, result)

    @contextmanager
    def _alone(self):
        """Held only while the scheduler works: streams may wait side by side, and nest."""
        if not self.turn.acquire(blocking=False):
            raise ViCAError("two threads use this engine at the same time: one at a time may")
        try:
            yield
        finally:
            self.turn.release()

    def _submit(self, request: Request, sink: deque, streaming: bool) -> Sequence:
        if not isinstance(request, Request):
            raise ViCAError(f"a request is a vica.engine.Request, got {type(request).__name__}")
        request.result = None
        readable = self.processor is not None and (streaming or request.stops)
        stream = TextStream(self.processor, request.stops) if readable else None
        seed = secrets.randbits(62) if request.seed is None else request.seed
        prepared = self.threads.submit(self.inputs.prepare, request)
        prepared.add_done_callback(self.scheduler.arrivals.add)
        sequence = Sequence(request, prepared, seed, stream, sink, streaming)
        self.scheduler.waiting.append(sequence)
        return sequence


def deliver(sequence: Sequence, result: Result | None) -> None:
    if result is not None:
        sequence.request.result, sequence.request.cancelled = result, False


def warn_of_ignored(generation_config) -> None:
    """Settings that a checkpoint may bring and `generate` would obey."""
    harmless = PLAIN | {"bad_words_ids": None}
    given = {name: getattr(generation_config, name, None) for name in harmless}
    if ignored := [f"{name}={given[name]}" for name in harmless if given[name] not in (None, harmless[name])]:
        log.warning("the engine does not apply %s of the checkpoint's generation_config", ", ".join(ignored))


# What decides a tower's features beside its weights.
OF_TOWER = ("model_type", "name", "num_attention_heads", "image_size", "patch_size", "hidden_act", "layer_norm_eps")


def binding(model, runner: Runner, processor) -> dict:
    """What kept K/V and features are made of: another value, and they mean nothing."""
    config, text, layers = model.config, model.config.text_config, runner.decoder.image_layers
    tower = {name: getattr(config.vision_config, name, None) for name in OF_TOWER}
    vision = [p for n, p in model.named_parameters() if "vision_tower" in n or "mm_projector" in n]
    making_kv = [t for i in layers for t in runner.decoder.layers[i].makers_of_kv()]
    return {
        "layers": layers,
        "weights": fingerprint([*vision, *making_kv]),
        "dtype": str(model.dtype),
        "rotary": [text.head_dim, text.rope_parameters],
        "norm": text.rms_norm_eps,
        "tower": [config.mm_vision_select_layer, config.mm_vision_select_feature, tower],
        "preprocessing": None if processor is None else processor.image_settings(),
    }
