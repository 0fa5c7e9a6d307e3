"""Measures training steps of both stages: samples a second and peak memory of accel beside dense, mask and
transformers.

Every column sees the same batches and weights: packed sequences on a flash kernel for accel and dense, padded ones with
a mask for mask and transformers. A step is forward, backward with gradient checkpointing, and AdamW on the trained
weights, with a rate of zero so that no column trains on another's result.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch

from ..model.loss import IGNORE
from ..plan.flops import sample_flops
from ..plan.sizes import visual_tokens
from ..train.flags import STAGES
from ..train.meter import count_tokens, passes
from ..train.stages import Trained, freeze
from ..utils.table import table
from .clock import Timing, failures_noted, product_rate, progress, timed
from .models import Models
from .options import TRAINING_COLUMNS
from .report import Report, own_failures, ratio

LEARNING = {"pretrain": Trained(("projector",)), "finetune": Trained(("projector", "language model"))}
VARIANTS = {"transformers": "dense", "stored": "accel"}  # for columns that are not named after their variant


@dataclass(frozen=True)
class Mix:
    """Text lengths like those of LLaVA's mixes: lognormal with this mean and spread, cut to the recipe's limit.

    `prefix`: tokens before the image. `answered`: the share of the text after it that has labels. `plain`: one sample
    in so many has no image (0: none).
    """

    mean: int
    spread: float
    longest: int
    prefix: int
    answered: float
    plain: int

    def lengths(self, samples: int, seed: int) -> np.ndarray:
        middle = np.log(self.mean) - self.spread**2 / 2
        drawn = np.random.default_rng(seed).lognormal(middle, self.spread, samples)
        return np.sort(np.clip(drawn.astype(int), self.prefix + 4, self.longest))[::-1]


MIXES = {"pretrain": Mix(30, 0.4, 128, 1, 1.0, 0), "finetune": Mix(230, 0.75, 2047, 35, 0.6, 16)}


def run(args: argparse.Namespace, models: Models) -> Report:
    peak = product_rate(models.device, models.dtype)
    cells, sections = [], []
    for stage in args.stages:
        batches = make_batches(models, MIXES[stage], args.samples, args.batch[STAGES.index(stage)], args.seed)
        of_stage = [measure(models, stage, column, batches, args.repeats, peak) for column in args.columns]
        cells += of_stage
        sections.append(stage_table(stage, of_stage, batches))
    sections.append(
        f"measured ceiling: product {peak / 1e12:.3g} TFLOP/s. FLOP use does not count what is computed twice"
    )
    return Report(sections, dict(product_flops_per_s=peak, cells=cells), own_failures(cells))


def make_batches(models: Models, mix: Mix, samples: int, size: int, seed: int) -> list[dict]:
    """Returns right-padded batches on the host, as the trainer's collator makes them."""
    lengths = mix.lengths(samples, seed)
    return [make_batch(models.config, mix, lengths[i : i + size], seed + i) for i in range(0, samples, size)]


def make_batch(config, mix: Mix, lengths: np.ndarray, seed: int) -> dict:
    random = torch.Generator().manual_seed(seed)
    width = int(lengths.max()) + 1
    ids = torch.randint(3, config.text_config.vocab_size - 1, (len(lengths), width), generator=random)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    images = 0
    for row, length in enumerate(lengths):
        has_image = not mix.plain or row % mix.plain != mix.plain - 1
        end = int(length) + has_image
        mask[row, :end] = 1
        first = end - int(mix.answered * (end - mix.prefix - has_image))
        labels[row, first:end] = ids[row, first:end]
        if has_image:
            ids[row, mix.prefix] = config.image_token_index
            labels[row, : mix.prefix + 2] = IGNORE  # nothing is predicted from an image's position
            images += 1
    side = config.vision_config.image_size
    pixels = torch.randn(images, 3, side, side, generator=random)
    pixels = pixels.pin_memory() if torch.cuda.is_available() else pixels
    return dict(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels)


def measure(models: Models, stage: str, column: str, batches: list[dict], repeats: int, peak: float) -> dict:
    """Returns a column's cell, with the seconds of each round over all batches."""
    timing = Timing()
    losses: list[torch.Tensor] = []
    samples = sum(len(b["input_ids"]) for b in batches)
    with failures_noted(timing, models.device):
        subject = (Peer if column == "transformers" else Ours)(models, column, stage)
        for turn in range(1 + repeats):
            if models.device.type == "cuda" and turn == 1:
                torch.cuda.reset_peak_memory_stats()
            seconds, losses = timed(lambda: [subject.step(batch) for batch in batches], models.device)
            timing.seconds += [seconds] if turn else []
        subject.close()
    memory = torch.cuda.max_memory_allocated() if models.device.type == "cuda" else None
    cell = dict(stage=stage, column=column, samples=samples, seconds=timing.seconds, failure=timing.failure)
    if timing.median:
        rate = samples / timing.median
        progress(f"train, {stage}, {column}: {rate:.2f} samples/s")
        flops = counted(models.wired(VARIANTS.get(column, column)).config, stage, batches)
        cell |= dict(samples_per_s=rate, peak_bytes=memory, losses=[float(x) for x in losses])
        cell |= dict(flop_use=flops / timing.median / peak) if column != "mask" else {}
    return cell


def counted(config, stage: str, batches: list[dict]) -> float:
    samples = (counts for batch in batches for counts in count_tokens(config, batch))
    return passes(LEARNING[stage]) * sum(sample_flops(config, *counts) for counts in samples)


class Ours:
    def __init__(self, models: Models, variant: str, stage: str):
        self.config, self.device = models.config, models.device
        self.model = self.wired(models, variant)
        # The other variants share accel's parameters, and unfroze them when they were made.
        freeze(models.accel, LEARNING[stage])
        if self.checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self.model.train()
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=0.0, weight_decay=0.0, fused=self.device.type == "cuda")

    def wired(self, models: Models, column: str):
        self.checkpointing = column != "stored"
        return models.wired(VARIANTS.get(column, column))

    def step(self, batch: dict) -> torch.Tensor:
        pixels = batch["pixel_values"].to(self.device, non_blocking=True)
        loss = self.loss({**batch, "pixel_values": pixels if len(pixels) else None})
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def loss(self, batch: dict) -> torch.Tensor:
        return self.model(**batch, skip_logits=True).loss

    def close(self) -> None:
        """Leaves the shared weights as they were."""
        del self.optimizer
        self.model.requires_grad_(False).eval()
        getattr(self.model, "activation_checkpointing_disable", self.model.gradient_checkpointing_disable)()


class Peer(Ours):
    """transformers' own LLaVA, which takes a placeholder for each visual token."""

    checkpointing = True

    def wired(self, models: Models, column: str):
        self.placeholder, self.visual = models.transformers.image_token, visual_tokens(models.config)
        return models.transformers.model

    def loss(self, batch: dict) -> torch.Tensor:
        return self.model(**{name: x.to(self.device) for name, x in self.expanded(batch).items() if x is not None}).loss

    def expanded(self, batch: dict) -> dict:
        ids, mask, labels = [], [], []
        for row in range(len(batch["input_ids"])):
            kept = batch["attention_mask"][row].bool()
            one = batch["input_ids"][row][kept]
            times = torch.where(one == self.config.image_token_index, self.visual, 1)
            ids.append(one.masked_fill(one == self.config.image_token_index, self.placeholder).repeat_interleave(times))
            labels.append(batch["labels"][row][kept].repeat_interleave(times))
            mask.append(torch.ones_like(ids[-1]))
        padded = [torch.nn.utils.rnn.pad_sequence(x, True, fill) for x, fill in ((ids, 0), (mask, 0), (labels, IGNORE))]
        return dict(zip(("input_ids", "attention_mask", "labels"), padded)) | {"pixel_values": batch["pixel_values"]}


def stage_table(stage: str, cells: list[dict], batches: list[dict]) -> str:
    by = {cell["column"]: cell.get("samples_per_s") for cell in cells}
    text = sum(int(b["attention_mask"].sum()) for b in batches)
    samples, images = sum(len(b["input_ids"]) for b in batches), sum(len(b["pixel_values"]) for b in batches)
    title = (
        f"{stage}: {samples} samples ({images} with an image), {(text - images) / samples:.0f} text tokens each, "
        f"{len(batches[0]['input_ids'])} a step, gradient checkpointing"
    )
    rows: list[tuple] = [("", "samples/s", "against dense", "against mask", "peak, GB", "FLOP use")]
    for cell in cells:
        rate = cell.get("samples_per_s")
        if rate is None:
            rows.append((TRAINING_COLUMNS[cell["column"]], cell["failure"], "", "", "", ""))
            continue
        memory = f"{cell['peak_bytes'] / 1e9:.1f}" if cell["peak_bytes"] else ""
        use = f"{cell['flop_use']:.0%}" if "flop_use" in cell else ""
        others = [by.get(x) for x in ("dense", "mask")]
        against = [ratio(1 / rate, 1 / other) if other else "" for other in others]
        rows.append((TRAINING_COLUMNS[cell["column"]], f"{rate:.2f}", *against, memory, use))
    return f"{title}\n\n{table(rows)}"
