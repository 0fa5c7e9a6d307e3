"""Measures the time of each phase: tower, prefill (against batch and visual tokens), first token from pixels,
decode."""

import argparse

import torch

from ..plan.sizes import kv_bytes, visual_tokens
from .clock import Timing, copy_rate, product_rate, progress, race
from .columns import Columns
from .inputs import Prompts, Shape
from .latency_tables import REFEREES, Setting, ceilings, phase_table
from .models import Models
from .report import Report, own_failures


def run(args: argparse.Namespace, models: Models) -> Report:
    bench = Latency(args, models)
    cells = [cell for phase in args.phases for where in bench.places(phase) for cell in bench.measure(phase, *where)]
    setting = Setting(
        models.config, args, copy_rate(models.device), product_rate(models.device, models.dtype), bench.decoder_bytes
    )
    for cell in cells:
        if cell["phase"] in ("decode", "generate") and cell["ms"]:
            cell["bandwidth_share"] = setting.read_ms / cell["ms"]
    sections = [phase_table(phase, cells, setting) for phase in args.phases if any(c["phase"] == phase for c in cells)]
    figures = dict(
        prefix=args.prefix, text=args.text, steps=args.steps, copy_bytes_per_s=setting.copy_rate,
        product_flops_per_s=setting.product_rate, decoder_bytes=setting.decoder_bytes, cells=cells,
    )  # fmt: skip
    return Report([*sections, ceilings(setting)], figures, own_failures(cells))


class Latency:
    def __init__(self, args: argparse.Namespace, models: Models):
        self.args, self.models, self.config, self.device = args, models, models.config, models.device
        self.tokens = visual_tokens(self.config) or args.visual[0]
        self.columns = Columns(models, self._limits, args.steps, args.compile_batch)

    def places(self, phase: str) -> list[tuple[int, int]]:
        """Returns (batch, visual tokens) of the phase's cells."""
        if phase in ("tower", "first") and self.config.vision_config is None:
            return []
        if phase == "visual":
            return [(self.args.visual_batch, visual) for visual in self.args.visual]
        return [(batch, self.tokens) for batch in self.args.batch]

    def measure(self, phase: str, batch: int, visual: int) -> list[dict]:
        shape = Shape(self.args.prefix, visual, self.args.text, self.args.steps + 1).check(self.config)
        prompts = Prompts(self.config, batch, shape, self.device, self.models.dtype)
        if phase == "generate":
            timings = self._rate_of_generate(prompts)
        else:
            timings = self._race(self.columns.jobs(phase, prompts))
        self.columns.clear()
        # at once, so that an interrupted run has reported something
        found = (f"{column} {t.failure or f'{1000 * t.median:.2f} ms'}" for column, t in timings.items())
        progress(f"{phase}, batch {batch}, {visual} visual tokens: {', '.join(found)}")
        return [as_cell(phase, batch, visual, column, timing, timings) for column, timing in timings.items()]

    def _race(self, makers: dict) -> dict[str, Timing]:
        wanted = {name: make for name, make in makers.items() if name in self.args.columns}
        return race(wanted, self.args.repeats, self.device)

    def _rate_of_generate(self, prompts: Prompts) -> dict[str, Timing]:
        """Returns the time of a step: that of long answers less that of answers of one token, divided by the steps."""
        whole = self._race(self.columns.jobs("generate", prompts, self.args.steps + 1))
        first = self._race(self.columns.jobs("generate", prompts, 1))
        for name, timing in whole.items():
            timing.failure = timing.failure or first[name].failure
            pairs = zip(sorted(timing.seconds), sorted(first[name].seconds))
            timing.seconds = [(long - short) / self.args.steps for long, short in pairs]
        return whole

    def _limits(self, variant: str) -> dict:
        """Returns room for the largest cell, as far as the card has it; beyond that a cell is out of memory."""
        args, model = self.args, self.models.wired(variant)
        places = [place for phase in args.phases for place in self.places(phase)]
        batch, beside = max(b for b, _ in places), args.prefix + args.text + args.steps
        tokens = [args.prefix + b * (beside + (visual if variant == "dense" else 0)) for b, visual in places]
        bytes_of_visual, bytes_of_text = kv_bytes(model.config, self.models.dtype.itemsize)
        kept = bytes_of_visual * (variant == "accel") + self.config.text_config.hidden_size * self.models.dtype.itemsize
        wanted = max(tokens) * bytes_of_text
        if self.device.type == "cuda":
            wanted = min(wanted, torch.cuda.mem_get_info(self.device)[0] // 2)
        return dict(max_batch=batch, kv_bytes=wanted, image_memory_bytes=batch * self.tokens * kept)

    @property
    def decoder_bytes(self) -> int:
        """Bytes of the weights that every step reads."""
        model = self.models.accel
        parts = [*model.model.layers.parameters(), *model.model.norm.parameters(), *model.lm_head.parameters()]
        return sum(p.numel() * p.element_size() for p in parts)


def as_cell(phase, batch, visual, column, timing: Timing, others: dict[str, Timing]) -> dict:
    ms = None if timing.median is None else 1000 * timing.median
    cell = dict(phase=phase, batch=batch, visual=visual, column=column, ms=ms)
    cell |= dict(all_ms=[1000 * s for s in timing.seconds], first_s=timing.first_seconds, failure=timing.failure)
    referee = others.get(REFEREES.get(column))
    cell["tokens"] = timing.tokens if ms else None  # the first tokens; the last ones in decoding
    if phase in ("prefill", "visual", "first") and ms and referee is not None and referee.tokens:
        cell["as_referee"] = sum(x == y for x, y in zip(timing.tokens, referee.tokens)) / batch
    return cell
