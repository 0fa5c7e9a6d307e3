"""Measures the memory of running requests: K/V by measurement and by formula, and the device's peak."""

import argparse
import gc
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..engine import Engine, Request
from ..engine.image_memory import FEATURES
from ..plan.config import ViCAConfig
from ..plan.layer import updates_visual
from ..plan.sizes import kv_bytes, visual_tokens
from ..utils.table import table
from .clock import Timing, failures_noted, progress
from .inputs import Prompts, Shape
from .models import Models
from .options import COLUMNS, MEMORY_COLUMNS
from .report import Report, own_failures, ratio


@dataclass
class Usage:
    """Bytes of K/V of the running requests and their images, and of all kept features."""

    requests: int = 0
    text: int = 0
    images: int = 0
    number_of_images: int = 0
    features: int = 0

    @property
    def kv(self) -> int:
        return self.text + self.images


def run(args: argparse.Namespace, models: Models) -> Report:
    shape = Shape(args.prefix, args.visual or visual_tokens(models.config) or 576, args.text, args.answer)
    shape.check(models.config)
    cells = [
        measure(models, shape, column, args.requests, questions)
        for questions in args.questions
        for column in MEMORY_COLUMNS
        if column in args.columns
    ]
    sections = [memory_table(cells, questions, shape, args) for questions in args.questions]
    return Report(sections, dict(shape=asdict(shape), requests=args.requests, cells=cells), own_failures(cells))


def measure(models: Models, shape: Shape, column: str, requests: int, questions: int) -> dict:
    prompts = Prompts(models.config, requests, shape, models.device, models.dtype)
    timing, usage, before = Timing(), Usage(), allocated(models.device)
    with failures_noted(timing, models.device):
        features = [prompts.features[i // questions] for i in range(requests)]
        if column == "transformers":
            usage = usage_of_transformers(models, prompts, features)
        else:
            usage = peak_usage_of_engine(models, prompts, features, MEMORY_COLUMNS[column])
    progress(f"memory, {column}, {questions} questions an image: {timing.failure or f'{usage.kv / 1e6:.3f} MB'}")
    formula = Formula(models.wired(MEMORY_COLUMNS[column]).config, models.dtype.itemsize, shape)
    # transformers shares nothing between requests
    shared = usage.requests * formula.alone if column == "transformers" else formula.together(usage)
    cell = dict(column=column, questions=questions, failure=timing.failure, running=usage.requests)
    cell |= dict(kv_bytes=usage.kv, text_bytes=usage.text, image_bytes=usage.images, feature_bytes=usage.features)
    return cell | dict(formula_bytes=shared, alone_bytes=formula.alone, peak_bytes=peak_above(before, models.device))


@dataclass
class Formula:
    """K/V bytes by formula. The last token of an answer needs no K/V."""

    config: ViCAConfig
    itemsize: int
    shape: Shape

    @property
    def alone(self) -> int:
        """Bytes of one request."""
        return self.together(Usage(requests=1, number_of_images=1))

    def together(self, usage: Usage) -> int:
        """Returns the bytes of the prefix once, each image once (dense: once a request), and each request's text and
        longest answer."""
        bytes_of_visual, bytes_of_text = kv_bytes(self.config, self.itemsize)
        images = usage.requests if updates_visual(self.config.plan) else usage.number_of_images
        tokens = self.shape.prefix + usage.requests * (self.shape.text + self.shape.answer - 1)
        return tokens * bytes_of_text + images * self.shape.visual * bytes_of_visual


def peak_usage_of_engine(models: Models, p: Prompts, features: list[torch.Tensor], variant: str) -> Usage:
    config, shape = models.wired(variant).config, p.shape
    bytes_of_visual, bytes_of_text = kv_bytes(config, models.dtype.itemsize)
    tokens = shape.prefix + shape.text + shape.answer + (shape.visual if variant == "dense" else 0)
    room = p.batch * shape.visual * (bytes_of_visual + models.dtype.itemsize * config.text_config.hidden_size)
    kv_room = p.batch * tokens * bytes_of_text
    engine = models.engine(variant, max_batch=p.batch, kv_bytes=kv_room, image_memory_bytes=room)
    options: dict[str, Any] = dict(max_new_tokens=shape.answer, ignore_eos=True)
    requests = [Request(ids, [x], **options) for ids, x in zip(p.ids, features)]
    most = Usage()
    for _ in engine.stream(requests):  # requests enter as they are prepared: the moment with most of them counts
        most = max(most, usage_of_engine(engine, bytes_of_text), key=lambda usage: (usage.requests, usage.kv))
    if failed := [r.result.error for r in requests if r.result and r.result.error]:
        raise RuntimeError(failed[0])
    return most


def usage_of_engine(engine: Engine, bytes_of_text: int) -> Usage:
    entries, pool = engine.image_memory.entries.values(), engine.runner.pool
    images = [e for e in entries if e.start != FEATURES and e.users]
    return Usage(
        engine.scheduler.running,
        (pool.size - pool.free) * bytes_of_text,
        sum(e.bytes for e in images),
        len(images),
        sum(e.bytes for e in entries if e.start == FEATURES),
    )


def usage_of_transformers(models: Models, p: Prompts, features: list[torch.Tensor]) -> Usage:
    peer = models.transformers
    tokens, cache = peer.prefill(p.expanded(peer.image_token), torch.stack(features))
    peer.decode(tokens, cache, p.shape.answer - 1)
    kv = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return Usage(p.batch, kv)


def allocated(device: torch.device) -> int | None:
    """Returns the bytes in use on a card, and restarts its peak count; None on a CPU, whose memory torch does not
    count."""
    gc.collect()  # frees engines that are gone
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_above(before: int | None, device: torch.device) -> int | None:
    return None if before is None else torch.cuda.max_memory_allocated(device) - before


def memory_table(cells: list[dict], questions: int, shape: Shape, args: argparse.Namespace) -> str:
    rows = [("MB a request", "running", "K/V held", "by formula", "against dense", "alone", "features", "peak of all")]
    cells = [c for c in cells if c["questions"] == questions]
    each = {c["column"]: c["kv_bytes"] / c["running"] for c in cells if not c["failure"]}
    for c in cells:
        name, alone = COLUMNS[c["column"]], megabytes(c["alone_bytes"])
        peak = "-" if c["peak_bytes"] is None else megabytes(c["peak_bytes"])
        if c["failure"]:
            rows.append((name, "-", c["failure"], "-", "-", alone, "-", peak))
        else:
            kv, n = each[c["column"]], c["running"]
            counted, features = megabytes(c["formula_bytes"] / n), megabytes(c["feature_bytes"] / n)
            against = ratio(kv, each.get("dense"))
            rows.append((name, n, megabytes(kv), counted, against, alone, features, peak))
    what = f"{args.requests} requests at once, {questions} on each image, {shape} tokens and room for {shape.answer}"
    note = "alone: by formula, nothing shared. peak: above the weights, the room that the engine took included"
    return "\n".join([what, "", table(rows), note])


def megabytes(number: float) -> str:
    return f"{number / 1e6:.3f}"
