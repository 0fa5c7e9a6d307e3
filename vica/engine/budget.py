"""How much the engine may hold: what the caller says, else shares of what the device has free; and how much of it runs
at once where that proves too much."""

import math
from dataclasses import dataclass

import torch

from ..plan.sizes import kv_bytes as bytes_of_tokens
from ..utils.errors import ViCAError

CPU_BYTES = 2**30  # of text K/V, and of images, on a CPU
RESERVE = 0.1  # of a card's memory for activations and captured graphs
MAX_BATCH = {"cuda": 256, "cpu": 16}
CALM = 64  # passes that must go well before more is tried again, at first and at most
MOST_CALM = 2**14
# How it is told that memory is short: by CUDA and Triton, CUDA's error codes, cuBLAS and cuDNN, torch on a CPU.
SHORT = ("out of memory", "out_of_memory", "cudaerrormemoryallocation", "alloc_failed", "allocation_failed",
         "defaultcpuallocator")  # fmt: skip


@dataclass(frozen=True)
class Budget:
    max_batch: int
    slots: int  # rows of text K/V
    image_bytes: int

    @classmethod
    def of(cls, model, max_batch: int | None, kv_bytes: int | None, image_bytes: int | None) -> "Budget":
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("kv_bytes", kv_bytes, 1),
            ("image_memory_bytes", image_bytes, 0),
        ):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ViCAError(f"{name} is {value!r}; it must be a whole number from {least}")
        text = model.config.text_config
        slot, window = bytes_of_tokens(model.config, model.dtype.itemsize)[1], text.max_position_embeddings
        text_bytes, image_default = shares(model, kv_bytes, image_bytes, slot * window)
        max_batch = max_batch or MAX_BATCH[model.device.type]
        slots = min(text_bytes // slot, max_batch * window)  # more could never be used
        if slots < 2:
            raise ViCAError(f"{text_bytes} bytes for text K/V hold no token; one takes {slot}")
        return cls(max_batch, slots, image_default if image_bytes is None else image_bytes)


def shares(model, kv_bytes: int | None, image_bytes: int | None, window_bytes: int) -> tuple[int, int]:
    """Bytes of text K/V and of images: as given, else all that the other leaves. A conversation as long as the model
    can hold must fit, if it does at all."""
    if model.device.type == "cpu":
        return kv_bytes or max(CPU_BYTES, window_bytes), CPU_BYTES
    free, total = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    room = max(0, free - int(RESERVE * total))
    if kv_bytes is not None:
        return kv_bytes, max(0, room - kv_bytes)
    share = 0.05 if model.config.plan[0].updates else 0.5  # dense keeps features only
    images = int(share * room) if image_bytes is None else image_bytes
    return max(room - images, min(window_bytes, free // 2)), images


class Limits:
    """How many requests run, and how many rows enter, at once. Both are lowered when memory is short and doubled when
    passes have gone well since; each time that this was too much, it takes twice as many passes."""

    def __init__(self, requests: int, rows: int):
        self.requests, self.rows = self.highest = requests, rows
        self.calm, self.went_well, self.raised = CALM, 0, False

    def lower(self, requests: float = math.inf, rows: float = math.inf) -> None:
        self.requests, self.rows = max(1, min(self.requests, requests)), max(1, min(self.rows, rows))
        if self.raised:
            self.calm = min(2 * self.calm, MOST_CALM)
        self.went_well, self.raised = 0, False

    def a_pass_went_well(self) -> None:
        self.went_well += 1
        if self.went_well >= self.calm and (self.requests, self.rows) != self.highest:
            self.requests, self.rows = min(2 * self.requests, self.highest[0]), min(2 * self.rows, self.highest[1])
            self.went_well, self.raised = 0, True


def out_of_memory(error: BaseException) -> bool:
    """Also where torch has no type for it, and where it broke a capture, whose own error then comes instead."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    hidden = error.__context__ if "captur" in text else None
    return any(sign in text for sign in SHORT) or hidden is not None and out_of_memory(hidden)
