"""Measures training speed: samples, tokens and FLOPs a second, counted from the batches as they pass."""

import time
from dataclasses import dataclass, field

import torch

from ..model.loss import IGNORE
from ..plan.config import ViCAConfig
from ..plan.flops import sample_flops
from ..plan.sizes import visual_tokens
from .stages import Trained

# Peaks in dense half precision, TFLOP/s, as the makers state them, by a part of the device's name.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "GH200": 989, "A100": 312, "A800": 312, "L40S": 362, "4090": 165}


def peak_flops(given_tflops: float | None, device: torch.device) -> float | None:
    if given_tflops is not None:
        return given_tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tflops * 1e12 for part, tflops in PEAKS.items() if part in name), None)


def count_tokens(config: ViCAConfig, batch: dict) -> list[tuple[int, int, int]]:
    """Returns the number of text tokens, visual tokens and labels of each sample."""
    mask = batch["attention_mask"] != 0
    images = ((batch["input_ids"] == config.image_token_index) & mask).sum(1)
    scored = (batch["labels"] != IGNORE).sum(1)
    columns = (mask.sum(1) - images, images * visual_tokens(config), scored)
    return list(zip(*(column.tolist() for column in columns)))


def passes(trained: Trained) -> int:
    """Returns the training FLOPs in units of a forward pass: the forward, the gradients of its inputs, and those of the
    weights if the language model learns."""
    return 3 if "language model" in trained.parts else 2


@dataclass
class Meter:
    """Counts of this process since the last reading. FLOPs are the model's own; recomputation by checkpointing is not
    counted."""

    config: ViCAConfig
    trained: Trained
    peak: float | None
    samples: int = 0
    text_tokens: int = 0
    flops: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def count(self, batch: dict) -> None:
        counts = count_tokens(self.config, batch)
        self.samples += len(batch["sample_ids"])
        self.text_tokens += sum(text for text, _, _ in counts)
        self.flops += passes(self.trained) * sum(sample_flops(self.config, *sample) for sample in counts)

    def read(self, world_size: int, gather) -> dict[str, float]:
        """Returns the figures of all processes. `gather` sums a list of counts over them."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        samples, tokens, flops = gather([float(self.samples), float(self.text_tokens), self.flops])
        self.samples = self.text_tokens = 0
        self.flops = 0.0
        figures = {"samples_per_s": samples / seconds, "text_tokens_per_s": tokens / seconds}
        if self.peak:
            figures["model_flop_use"] = flops / seconds / (self.peak * world_size)
        if torch.cuda.is_available():
            figures["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return {name: float(f"{value:.4g}") for name, value in figures.items()}
