"""Decide how much the engine may hold, and how much of that runs at once where it proves too much.

The caller's limits count; otherwise shares of the device's free memory.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..plan.layer import updates_visual
from ..plan.sizes import kv_bytes as bytes_of_tokens
from ..utils.errors import ViCAError

CPU_BYTES = 2**30  # of text K/V, and of images, on a CPU
RESERVE = 0.1  # share of a card's memory for activations and captured graphs
MAX_BATCH = {"cuda": 256, "cpu": 16}
STEPS_BEFORE_RETRY = 64  # passes that must succeed before the limits are raised again, at first
MAX_STEPS_BEFORE_RETRY = 2**14
# Words by which CUDA and Triton, CUDA's error codes, cuBLAS and cuDNN, and torch on a CPU report short memory.
OUT_OF_MEMORY_SIGNS = (
    "out of memory",
    "out_of_memory",
    "cudaerrormemoryallocation",
    "alloc_failed",
    "allocation_failed",
    "defaultcpuallocator",
)


@dataclass(frozen=True)
class Budget:
    """The engine's limits."""

    max_batch: int
    kv_tokens: int  # text tokens whose K/V fit
    image_bytes: int

    @classmethod
    def of(cls, model: Any, max_batch: int | None, kv_bytes: int | None, image_bytes: int | None) -> "Budget":
        """Returns the given limits, with the default for each that is None."""
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("kv_bytes", kv_bytes, 1),
            ("image_memory_bytes", image_bytes, 0),
        ):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ViCAError(f"{name} is {value!r}; it must be a whole number from {least}")
        text = model.config.text_config
        token, window = bytes_of_tokens(model.config, model.dtype.itemsize)[1], text.max_position_embeddings
        text_bytes, image_default = shares(model, kv_bytes, image_bytes, token * window)
        max_batch = max_batch or MAX_BATCH[model.device.type]
        kv_tokens = min(text_bytes // token, max_batch * window)  # no more could ever be used
        if kv_tokens < 2:
            raise ViCAError(f"{text_bytes} bytes for text K/V hold no token; one takes {token}")
        return cls(max_batch, kv_tokens, image_default if image_bytes is None else image_bytes)


def shares(model: Any, kv_bytes: int | None, image_bytes: int | None, window_bytes: int) -> tuple[int, int]:
    """Returns bytes of text K/V and of images: as given, else all that the other leaves.

    `window_bytes`: K/V of the longest conversation that the model can hold. It gets room if the device has it at all.
    """
    if model.device.type == "cpu":
        return kv_bytes or max(CPU_BYTES, window_bytes), CPU_BYTES
    free, total = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    room = max(0, free - int(RESERVE * total))
    if kv_bytes is not None:
        return kv_bytes, max(0, room - kv_bytes)
    share = 0.05 if updates_visual(model.config.plan) else 0.5  # dense keeps features only, which are small
    images = int(share * room) if image_bytes is None else image_bytes
    return max(room - images, min(window_bytes, free // 2)), images


class Limits:
    """How many requests may run, and how many tokens may enter, at once.

    Both are lowered when memory is short, and doubled when enough passes have succeeded since. Each time that doubling
    was too much, it takes twice as many passes until the next attempt.
    """

    def __init__(self, requests: int, tokens: int) -> None:
        self.requests = requests
        self.tokens = tokens
        self.highest = (requests, tokens)
        self.steps_before_retry, self.successes, self.raised = STEPS_BEFORE_RETRY, 0, False

    def lower(self, requests: int | None = None, tokens: int | None = None) -> None:
        """Allows at most so many, but at least one; None changes nothing."""
        self.requests = max(1, min(self.requests, self.requests if requests is None else requests))
        self.tokens = max(1, min(self.tokens, self.tokens if tokens is None else tokens))
        if self.raised:
            self.steps_before_retry = min(2 * self.steps_before_retry, MAX_STEPS_BEFORE_RETRY)
        self.successes, self.raised = 0, False

    def record_success(self) -> None:
        """Counts a pass that found enough memory."""
        self.successes += 1
        if self.successes >= self.steps_before_retry and (self.requests, self.tokens) != self.highest:
            self.requests = min(2 * self.requests, self.highest[0])
            self.tokens = min(2 * self.tokens, self.highest[1])
            self.successes, self.raised = 0, True


def out_of_memory(error: BaseException) -> bool:
    """Whether an error reports short memory. Some of torch's have no type for it; and where short memory broke a
    capture, the capture's own error comes, with the cause as its context."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    cause = error.__context__ if "captur" in text else None
    return any(sign in text for sign in OUT_OF_MEMORY_SIGNS) or cause is not None and out_of_memory(cause)
