"""Measures questions a second on a workload shaped like POPE: many questions on few images, answers of up to four
tokens."""

import argparse
import gc
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine import Request
from ..plan.sizes import visual_tokens
from ..utils.errors import ViCAError
from ..utils.table import table
from .clock import Timing, failures_noted, progress, timed
from .drive import answer_all
from .inputs import Prompts, Shape, write_pictures
from .models import Models
from .options import COLUMNS, POPE_IMAGES, POPE_QUESTIONS, THROUGHPUT_COLUMNS
from .report import Report, own_failures, ratio

POPE_PARTS = 3  # each part asks a few questions on every image
WARM_UP_BATCHES = 4
NOTE = "ours from JPEG files to answers; transformers from prepared pixels and ids of one length, which favours it"
# The engine's columns: the variant, and options that say which results outlive a request.
ENGINES = {
    "dense": ("dense", {}),
    "nothing": ("accel", dict(keep_prefix=False, keep_images=False)),
    "prefix": ("accel", dict(keep_images=False)),
    "image": ("accel", {}),
}


@dataclass
class Workload:
    """Prompts, pictures and answer length. Question i is about picture `picture[i]`."""

    prompts: Prompts
    pictures: list[Path]
    picture: list[int]
    answer: int

    def requests(self, count: int) -> list[Request]:
        options: dict[str, Any] = dict(max_new_tokens=self.answer, ignore_eos=True)
        pairs = zip(self.prompts.ids[:count], self.picture)
        return [Request(ids, [self.pictures[at]], **options) for ids, at in pairs]


def run(args: argparse.Namespace, models: Models) -> Report:
    if models.processor is None or models.config.vision_config is None:
        raise ViCAError("throughput starts from images: the model needs a vision tower and a tokenizer")
    images = args.images or max(1, round(args.questions * POPE_IMAGES / POPE_QUESTIONS))
    shape = Shape(args.prefix, visual_tokens(models.config), args.text, args.answer).check(models.config)
    with tempfile.TemporaryDirectory() as folder:
        progress(f"throughput: writing {images} pictures of 640 x 480")
        prompts = Prompts(models.config, args.questions, shape, models.device, models.dtype)
        pictures = write_pictures(Path(folder), images)
        work = Workload(prompts, pictures, pope_order(args.questions, images), args.answer)
        cells = measure(args, models, work)
    figures = dict(shape=asdict(shape), images=images, note=NOTE, cells=cells)
    return Report([throughput_table(cells, args, images, shape)], figures, own_failures(cells))


def pope_order(questions: int, images: int) -> list[int]:
    """Returns the picture of each question. Each of POPE's three parts goes through all images, with a few questions on
    one image after another."""
    part = -(-questions // POPE_PARTS)
    return [(i % part) * images // part for i in range(questions)]


def measure(args: argparse.Namespace, models: Models, work: Workload) -> list[dict]:
    """Returns all cells. transformers comes first, because an engine takes the memory that it finds free."""
    cells, batches = [], {"transformers": [1], "batched": args.peer_batch}
    for column in (c for c in THROUGHPUT_COLUMNS if c in args.columns):
        if column in ENGINES:
            cells.append(engine_cell(args, models, work, column))
        else:
            cells += [peer_cell(args, models, work, column, batch) for batch in batches[column]]
    return cells


def cell_of(column: str, batch: int | None, questions: int, images: int, timing: Timing) -> dict:
    seconds = timing.median
    rates = dict(questions_per_s=seconds and questions / seconds, images_per_s=seconds and images / seconds)
    cell = dict(column=column, batch=batch, questions=questions, images=images, seconds=timing.seconds, **rates)
    rate = f"{rates['questions_per_s']:.1f} questions/s" if seconds else timing.failure
    progress(f"throughput, {column}{f', batch {batch}' if batch else ''}: {rate}")
    return cell | dict(first_s=timing.first_seconds, failure=timing.failure)


def peer_cell(args: argparse.Namespace, models: Models, work: Workload, column: str, batch: int) -> dict:
    """Measures transformers. Its pixels and ids are prepared before the clock starts, and all prompts have one length:
    both favour it."""
    count = min(len(work.picture), max(args.peer_questions, 2 * batch))
    count = max(batch, count - count % batch)
    timing = Timing()
    with failures_noted(timing, models.device):
        if count > len(work.picture):
            raise ViCAError(f"{len(work.picture)} questions fill no batch of {batch}")
        peer = models.transformers
        ids, pixels = work.prompts.expanded(peer.image_token)[:count], pixels_of(models, work, count)
        batches = [(ids[i : i + batch], pixels[i : i + batch]) for i in range(0, count, batch)]

        timing.first_seconds, out = timed(lambda: peer.generate(*batches[0], work.answer), models.device)
        if out.shape != (batch, work.answer):
            raise ViCAError(f"transformers gave {list(out.shape)} tokens, not {[batch, work.answer]}")
        for _ in range(args.repeats):
            seconds, _ = timed(lambda: [peer.generate(*one, work.answer) for one in batches], models.device)
            timing.seconds.append(seconds)
    return cell_of(column, batch, count, len(set(work.picture[:count])), timing)


def pixels_of(models: Models, work: Workload, count: int) -> torch.Tensor:
    wanted = sorted(set(work.picture[:count]))
    images = dict(zip(wanted, models.processor.process_images([work.pictures[at] for at in wanted])))
    pixels = torch.from_numpy(np.stack([images[at] for at in work.picture[:count]]))
    return pixels.to(models.device, models.dtype)


def engine_cell(args: argparse.Namespace, models: Models, work: Workload, column: str) -> dict:
    """Measures the engine end to end, from picture files that are new to it in each run."""
    variant, options = ENGINES[column]
    count = min(args.questions, args.peer_questions) if variant == "dense" else args.questions
    timing, requests = Timing(), work.requests(count)
    with failures_noted(timing, models.device):
        engine = models.engine(variant, max_batch=args.max_batch, **options)
        warm_up = requests[: WARM_UP_BATCHES * engine.max_batch]
        timing.first_seconds, _ = timed(lambda: answer_all(engine, warm_up), models.device)  # it compiles and captures
        for repeat in range(1, 1 + args.repeats):
            engine.image_memory.clear()
            # a new time makes the file unseen, and an old one keeps it from counting as still being written
            for picture in work.pictures:
                os.utime(picture, (repeat, repeat))
            timing.seconds.append(timed(lambda: answer_all(engine, requests), models.device)[0])
    engine = None
    gc.collect()  # frees its memory for the next engine
    if models.device.type == "cuda":
        torch.cuda.empty_cache()
    return cell_of(column, None, count, len(set(work.picture[:count])), timing)


def throughput_table(cells: list[dict], args: argparse.Namespace, images: int, shape: Shape) -> str:
    best = best_cells(cells)
    one, batched = (
        next((c["questions_per_s"] for c in best if c["column"] == x), None) for x in THROUGHPUT_COLUMNS[:2]
    )
    rows = [("", "questions", "images", "questions/s", "images/s", "against one by one", "against best batch")]
    for c in best:
        name = COLUMNS[c["column"]] + (f" ({c['batch']})" if c["batch"] else "")
        rate, pictures = c["questions_per_s"], c["images_per_s"]
        figures = (f"{rate:.1f}", f"{pictures:.2f}") if rate else (c["failure"], "-")
        rows.append((name, c["questions"], c["images"], *figures, ratio(one, rate), ratio(batched, rate)))
    tried = [c for c in cells if c["column"] == "batched"]
    rates = (f"{c['batch']}: {c['failure'] or format(c['questions_per_s'], '.1f')}" for c in tried)
    notes = [f"transformers by batch, questions/s: {', '.join(rates)}"] if tried else []
    what = f"{args.questions} questions on {images} images, {shape} tokens, answers of {args.answer} tokens"
    return "\n".join([what, "", table(rows), *notes, NOTE])


def best_cells(cells: list[dict]) -> list[dict]:
    """Returns one cell a column: transformers' best batch, or the first if all failed."""
    best: dict[str, dict] = {}
    for cell in cells:
        leader = best.get(cell["column"])
        if leader is None or (cell["questions_per_s"] or 0) > (leader["questions_per_s"] or 0):
            best[cell["column"]] = cell
    return list(best.values())
