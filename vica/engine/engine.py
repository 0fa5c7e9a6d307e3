"""Answer requests in any number and mix, in continuous batches.

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
from typing import Any

import numpy as np
import torch

from ..data.processor import ViCAProcessor
from ..kernels.weights import check_plain
from ..model.generation import PLAIN
from ..model.llava import ViCAForConditionalGeneration
from ..plan.config import ViCAConfig
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
from .scheduler import Scheduler
from .sequence import Outcome, Sequence
from .text import TextStream

log = logging.getLogger(__name__)

PREFETCH_BATCHES = 2  # batches of requests that are prepared before they enter


class Engine:
    """Answers requests with one model.

    `kv_bytes` bounds the K/V of text, `image_memory_bytes` the K/V and features of images; both default to shares of
    the card's free memory, on a CPU to 1 GiB each. With `keep_prefix` and `keep_images` False, nothing outlives its
    request.

    The model's weights are fused in place: it stays usable, but must not be moved or changed while the engine lives.
    """

    def __init__(
        self,
        model: ViCAForConditionalGeneration,
        processor: ViCAProcessor | None = None,
        *,
        max_batch: int | None = None,
        kv_bytes: int | None = None,
        image_memory_bytes: int | None = None,
        keep_prefix: bool = True,
        keep_images: bool = True,
        cuda_graphs: bool = True,
        workers: int | None = None,
    ) -> None:
        check_model(model)
        assert isinstance(model.config, ViCAConfig)
        self.model, self.processor, self.config = model.eval(), processor, model.config
        check_plain(model.lm_head)
        budget = Budget.of(model, max_batch, kv_bytes, image_memory_bytes)
        with torch.inference_mode(False), torch.no_grad():
            self.runner = Runner(model, budget.max_batch, budget.kv_tokens, cuda_graphs)
        # No method: only its user may hold the engine, or its memory would wait for Python's collector.
        made_of = partial(binding, model, self.runner, processor)
        self.image_memory = ImageMemory(budget.image_bytes, model.device, made_of, keep_images)
        self.inputs = Inputs(self.config, processor, visual_tokens(self.config), self.image_memory.knows, keep_prefix)
        self.threads = ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1), "vica-inputs")
        warn_of_ignored(model.generation_config)
        eos = model.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
        self.scheduler = Scheduler(self.runner, self.inputs, self.image_memory, ends, budget.max_batch, keep_prefix)
        self.max_batch, self.turn = budget.max_batch, threading.Lock()

    def generate(self, requests: Iterable[Request], progress: bool = False) -> list[Result]:
        """Returns the results, in order. A request that fails says why in its result; the others are answered."""
        requests = list(requests)
        results: list[Any] = [None] * len(requests)
        with counter(len(requests), "answers", shown=progress) as bar:
            for place, request, _ in self._run(requests, streaming=False):
                results[place] = request.result
                bar.update()
        return results

    def results(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Yields each request when it has its `result`, in any order. Leaving the loop cancels the rest."""
        for _, request, _ in self._run(requests, streaming=False):
            yield request

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Token]]:
        """Yields the tokens of all requests as they come, in any order. `request.result` is there with the last token,
        and that of a failed request when the stream ends. Leaving the loop cancels the rest."""
        for _, request, token in self._run(requests, streaming=True):
            if token is not None:
                yield request, token

    def cancel(self, request: Request) -> None:
        """Ends a request with the tokens that it has so far; one that the engine has yet to draw from its source ends
        as soon as it is drawn."""
        request.cancelled = request.result is None

    def warm_up(self, batches: Iterable[int] = (1, 8, 64), text: int = 60) -> float:
        """Compiles and captures what the first batches of these sizes, with prompts of so many text tokens, would wait
        for. Returns the seconds it took. The text is shorter where the model's window is, and there are fewer images
        where the image memory has no room for more beside its entries."""
        start = time.perf_counter()
        vision: Any = self.config.vision_config
        for size in (min(size, self.max_batch) for size in batches):
            for _ in range(3):  # a captured pass runs uncaptured first, then it is captured, then replayed
                before = set(self.image_memory.entries)
                results = self.generate(self._unseen_requests(size, text))
                self.image_memory.clear(set(self.image_memory.entries) - before)
                if failed := [r.error for r in results if r.error]:
                    raise ViCAError(f"warming up with {size} requests failed: {failed[0]}")
                if vision is not None:
                    with self._one_thread(), torch.inference_mode():
                        self.runner.encode(np.zeros((size, 3, vision.image_size, vision.image_size), np.float32))
        return time.perf_counter() - start

    def _unseen_requests(self, count: int, text: int, answer: int = 4) -> list[Request]:
        """Returns synthetic requests about unseen images, in a number and length that fit the engine's limits."""
        memory, visual, width = self.image_memory, max(1, self.inputs.visual_tokens), self.inputs.width
        features = visual * width * self.runner.dtype.itemsize  # kept beside the K/V computed from them
        bytes_each = self.runner.image_bytes(visual) + (features if self.runner.images_are_kv else 0)
        positions = self.runner.width - (answer - 1)
        images = min(count, (memory.limit - memory.bytes) // bytes_each) if visual < positions else 0
        text = max(1, min(text, positions - visual if images else positions))
        word, placeholder = min(3, self.inputs.vocabulary - 1), self.inputs.image_token
        prompt = [word] * (text // 2) + [placeholder] * (images > 0) + [word] * (text - text // 2)
        shown = [[x] for x in torch.randn(images, visual, width)] or [[]]
        return [Request(prompt, shown[i % len(shown)], answer, ignore_eos=True) for i in range(count)]

    # --- one call ---

    def _run(self, requests: Iterable[Request], streaming: bool) -> Iterator[tuple[int, Request, Token | None]]:
        """Yields a request's place, the request and a token: for each token when streaming, and with its result."""
        source = enumerate(requests)
        places: dict[Sequence, int] = {}  # of this call's requests that have no result yet
        outcomes: deque[Outcome] = deque()  # that the scheduler has made and this call has not yielded
        more = True
        try:
            while more or places:
                while more and self.scheduler.waiting < PREFETCH_BATCHES * self.max_batch:
                    more = self._submit_next(source, places, outcomes, streaming)
                with self._one_thread(), torch.inference_mode():
                    self.scheduler.step()
                while outcomes:
                    sequence, token, result = outcomes.popleft()
                    deliver(sequence, result)
                    place = places[sequence] if result is None else places.pop(sequence)
                    yield place, sequence.request, token
        finally:
            self._cancel_rest(places, outcomes)

    def _submit_next(
        self,
        source: Iterator[tuple[int, Request]],
        places: dict[Sequence, int],
        outcomes: deque[Outcome],
        streaming: bool,
    ) -> bool:
        """Submits the source's next request; returns False if there is none. Drawing it needs no turn, so that a source
        may itself ask the engine."""
        if (following := next(source, None)) is None:
            return False
        place, request = following
        with self._one_thread():
            places[self._submit(request, outcomes, streaming)] = place
        return True

    def _submit(self, request: Request, sink: deque[Outcome], streaming: bool) -> Sequence:
        """Starts to prepare a request and makes it wait for its turn."""
        if not isinstance(request, Request):
            raise ViCAError(f"a request is a vica.engine.Request, got {type(request).__name__}")
        request.result = None
        processor = self.processor if streaming or request.stops else None
        stream = None if processor is None else TextStream(processor, request.stops)
        seed = secrets.randbits(62) if request.seed is None else request.seed
        prepared = self.threads.submit(self.inputs.prepare, request)
        sequence = Sequence(request, prepared, seed, self.processor, stream, sink, streaming)
        self.scheduler.submit(sequence)
        return sequence

    def _cancel_rest(self, sequences: Iterable[Sequence], outcomes: Iterable[Outcome]) -> None:
        """Cancels what a call has left. If the call is closed during a step, by another thread or by Python's
        collector, the next step drops its sequences."""
        for sequence in sequences:
            sequence.cancelled = True
        if self.turn.acquire(blocking=False):
            try:
                self.scheduler.drop_cancelled()
            finally:
                self.turn.release()
        for sequence, _, result in outcomes:
            deliver(sequence, result)

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        """Holds the engine while the scheduler works, and only then: calls may take turns, and nest. Raises ViCAError
        where another thread holds it."""
        if not self.turn.acquire(blocking=False):
            raise ViCAError("two threads use this engine at the same time: one at a time may")
        try:
            yield
        finally:
            self.turn.release()


def check_model(model: Any) -> None:
    """Raises ViCAError for models that the engine cannot run."""
    if not isinstance(model, ViCAForConditionalGeneration):
        raise ViCAError(f"the engine runs a ViCAForConditionalGeneration, not a {type(model).__name__}")
    if model.config.variant not in ("accel", "dense"):
        raise ViCAError(f"the engine runs variants accel and dense, not {model.config.variant!r}")
    if not is_uniform(model.config.plan):
        raise ViCAError(
            "the engine runs plans with the same visual tokens in every layer, and this model's plan mixes or "
            "drops them: use model.generate"
        )


def deliver(sequence: Sequence, result: Result | None) -> None:
    """Gives a request its result."""
    if result is not None:
        sequence.request.result, sequence.request.cancelled = result, False


def warn_of_ignored(generation_config: Any) -> None:
    """Warns of settings that a checkpoint brings, and that the engine ignores but `model.generate` obeys."""
    harmless = PLAIN | {"bad_words_ids": None}
    given = {name: getattr(generation_config, name, None) for name in harmless}
    if ignored := [f"{name}={given[name]}" for name in harmless if given[name] not in (None, harmless[name])]:
        log.warning("the engine does not apply %s of the checkpoint's generation_config", ", ".join(ignored))


# What decides a tower's features beside its weights.
TOWER_SETTINGS = (
    "model_type",
    "name",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


def binding(model: Any, runner: Runner, processor: ViCAProcessor | None) -> dict[str, Any]:
    """Returns a fingerprint of everything that stored image K/V and features depend on. If any entry differs, a saved
    image memory is rejected."""
    config, text, layers = model.config, model.config.text_config, runner.decoder.image_layers
    tower = {name: getattr(config.vision_config, name, None) for name in TOWER_SETTINGS}
    vision = [p for n, p in model.named_parameters() if "vision_tower" in n or "mm_projector" in n]
    kv_weights = [t for i in layers for t in runner.decoder.layers[i].kv_weights()]
    return {
        "layers": layers,
        "weights": fingerprint([*vision, *kv_weights]),
        "dtype": str(model.dtype),
        "rotary": [text.head_dim, text.rope_parameters],
        "norm": text.rms_norm_eps,
        "tower": [config.mm_vision_select_layer, config.mm_vision_select_feature, tower],
        "preprocessing": None if processor is None else processor.image_settings(),
    }
