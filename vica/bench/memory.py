"""Memory that requests hold while they run: K/V by measurement and by formula, and the device's peak."""

import argparse
import gc
from dataclasses import asdict, dataclass

import torch

from ..engine import Engine, Request
from ..engine.image_memory import FEATURES
from ..plan.config import ViCAConfig
from ..plan.sizes import kv_bytes, visual_tokens
from ..utils.table import table
from .clock import Timing, failures_noted, progress
from .inputs import Prompts, Shape
from .models import Models
from .options import COLUMNS, MEMORY_COLUMNS
from .report import Report, own_failures, ratio


@dataclass
class Held:
    """Bytes of K/V of the running requests and their images, and beside them of all features that are kept."""

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
    timing, held, before = Timing(), Held(), allocated(models.device)
    with failures_noted(timing, models.device):
        features = [prompts.features[i // questions] for i in range(requests)]
        if column == "transformers":
            held = transformers_holds(models, prompts, features)
        else:
            held = engine_holds(models, prompts, features, MEMORY_COLUMNS[column])
    progress(f"memory, {column}, {questions} questions an image: {timing.failure or f'{held.kv / 1e6:.3f} MB'}")
    counted = Counted(models.wired(MEMORY_COLUMNS[column]).config, models.dtype.itemsize, shape)
    # transformers shares nothing between requests
    shared = held.requests * counted.alone if column == "transformers" else counted.together(held)
    cell = dict(column=column, questions=questions, failure=timing.failure, running=held.requests)
    cell |= dict(kv_bytes=held.kv, text_bytes=held.text, image_bytes=held.images, feature_bytes=held.features)
    return cell | dict(formula_bytes=shared, alone_bytes=counted.alone, peak_bytes=peak_above(before, models.device))


@dataclass
class Counted:
    """K/V by formula. The last token's are never needed."""

    config: ViCAConfig
    itemsize: int
    shape: Shape

    @property
    def alone(self) -> int:
        """Of one request."""
        return self.together(Held(requests=1, number_of_images=1))

    def together(self, held: Held) -> int:
        """The prefix once, each image once (dense: once a request), each request's text and the answer it may give."""
        of_visual, of_row = kv_bytes(self.config, self.itemsize)
        images = held.requests if self.config.plan[0].updates else held.number_of_images
        rows = self.shape.prefix + held.requests * (self.shape.text + self.shape.answer - 1)
        return rows * of_row + images * self.shape.visual * of_visual


def engine_holds(models: Models, p: Prompts, features: list[torch.Tensor], variant: str) -> Held:
    config, shape = models.wired(variant).config, p.shape
    of_visual, of_row = kv_bytes(config, models.dtype.itemsize)
    rows = shape.prefix + shape.text + shape.answer + (shape.visual if variant == "dense" else 0)
    room = p.batch * shape.visual * (of_visual + models.dtype.itemsize * config.text_config.hidden_size)
    engine = models.engine(variant, max_batch=p.batch, kv_bytes=p.batch * rows * of_row, image_memory_bytes=room)
    options = dict(max_new_tokens=shape.answer, ignore_eos=True)
    requests = [Request(ids, [x], **options) for ids, x in zip(p.ids, features)]
    most = Held()
    for _ in engine.stream(requests):  # they enter as they are prepared: when most of them run is what counts
        most = max(most, held_by(engine, of_row), key=lambda held: (held.requests, held.kv))
    if failed := [r.result.error for r in requests if r.result.error]:
        raise RuntimeError(failed[0])
    return most


def held_by(engine: Engine, of_row: int) -> Held:
    entries, pool = engine.image_memory.entries.values(), engine.runner.pool
    images = [e for e in entries if e.start != FEATURES and e.users]
    return Held(
        len(engine.scheduler.active),
        (pool.slots - pool.free) * of_row,
        sum(e.bytes for e in images),
        len(images),
        sum(e.bytes for e in entries if e.start == FEATURES),
    )


def transformers_holds(models: Models, p: Prompts, features: list[torch.Tensor]) -> Held:
    peer = models.transformers
    tokens, cache = peer.prefill(p.expanded(peer.image_token), torch.stack(features))
    peer.decode(tokens, cache, p.shape.answer - 1)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return Held(p.batch, held)


def allocated(device: torch.device) -> int | None:
    """Now, on a card, whose peak is counted anew from here; a CPU's memory torch does not count."""
    gc.collect()  # engines that are gone
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
            held, n = each[c["column"]], c["running"]
            counted, features = megabytes(c["formula_bytes"] / n), megabytes(c["feature_bytes"] / n)
            against = ratio(held, each.get("dense"))
            rows.append((name, n, megabytes(held), counted, against, alone, features, peak))
    what = f"{args.requests} requests at once, {questions} on each image, {shape} tokens and room for {shape.answer}"
    note = "alone: by formula, nothing shared. peak: above the weights, the room that the engine took included"
    return "\n".join([what, "", table(rows), note])


def megabytes(number: float) -> str:
    return f"{number / 1e6:.3f}"
