"""Check training data: read every record and image once, and say what is broken."""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..checkpoint.source import Source
from ..data.check import Check, Summary
from ..data.conversation import get_template
from ..data.processor import ViCAProcessor
from ..data.samples import open_samples
from ..data.sources import where_images_from
from ..loading import load_processor
from ..plan.sizes import visual_tokens
from ..plan.wiring import Wiring
from ..utils.errors import ViCAError
from ..utils.program import quiet_transformers
from . import common

SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    summary = "Read everything once; exit code 1 if a sample is broken."
    verb = verbs.add_parser("check", help=summary, description=summary)
    verb.add_argument("files", nargs="+", metavar="FILE", help=".json, .jsonl, .parquet, a folder of it, or hub:NAME")
    verb.add_argument("--image-folder", metavar="D", help="where the images lie that records name")
    verb.add_argument("--model", metavar="M", help="tokenize as this model does; without it texts are only read")
    verb.add_argument("--template", default="v1", metavar="NAME", help="prompt template to tokenize with (v1)")
    limit = f"of training, beyond which a sample is cut {common.DEFAULT}"
    verb.add_argument("--model-max-length", type=int, default=2048, metavar="N", help=limit)
    workers = min(8, os.cpu_count() or 1)
    verb.add_argument("--workers", type=int, default=workers, metavar="N", help=f"processes {common.DEFAULT}")
    verb.add_argument("--report", metavar="FILE", help="write all broken samples here, one JSON line each")


def run(args: argparse.Namespace) -> None:
    get_template(args.template)
    if args.workers < 0:
        raise ViCAError(f"--workers is {args.workers}; it must be at least 0")
    if args.report:
        Path(args.report).write_text("")  # before hours of reading, not after
    processor, an_image = read_processor(args.model) if args.model else (None, 1)
    check = Check(open_samples(args.files), args.image_folder, processor, args.template, an_image)
    summary = Summary()
    for found in tqdm(check.findings(args.workers), total=len(check), unit=" samples"):
        summary.add(found)
    told = describe(summary, args.model_max_length if args.model else None)
    print("\n".join(f"{name:<14}{value}" for name, value in told))
    tell_broken(summary, args.report)


def read_processor(model: str) -> tuple[ViCAProcessor, int]:
    """The processor, and the positions that an image takes."""
    quiet_transformers()
    source = Source.at(model, weights=False)
    config = source.config(Wiring(variant="dense"))  # for which a checkpoint need not name its layers
    processor = load_processor(source.folder, config)
    if processor is None:
        raise ViCAError(f"{model} holds no tokenizer")
    return processor, visual_tokens(config) or 1


def describe(summary: Summary, limit: int | None) -> Iterator[tuple[str, str]]:
    twice = sum(times > 1 for times in summary.ids.values())
    sound = summary.samples - len(summary.broken)
    text_only = sound - summary.with_image
    yield "samples", f"{summary.samples:,}, of which {len(summary.broken):,} are broken"
    yield "with image", f"{summary.with_image:,} with {summary.images:,} images, {text_only:,} text only"
    yield "turns", f"{summary.turns:,}"
    yield "ids", f"{len(summary.ids):,}, {twice:,} of them more than once"
    if limit is None or not sound:  # nothing was tokenized
        return
    lengths = sorted(summary.lengths)
    shares = {"shortest": 0, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1}
    spread = [f"{name} {lengths[int(share * (sound - 1))]:,}" for name, share in shares.items()]
    yield "positions", f"{sum(lengths):,}: " + ", ".join(spread)
    yield "learned", f"{summary.learned:,} tokens"
    cut = sum(length > limit for length in lengths)
    yield "too long", f"{cut:,} for --model-max-length {limit:,}: cut in training"


def tell_broken(summary: Summary, report: str | None) -> None:
    for broken in summary.broken[:SHOWN]:
        print(printable(f"broken: {broken.id}: {broken.reason}"))
    if report:
        lines = [json.dumps({"id": broken.id, "reason": broken.reason}) + "\n" for broken in summary.broken]
        Path(report).write_text("".join(lines))
    if summary.broken:
        get = next((told for broken in summary.broken if (told := where_images_from(broken.reason))), "")
        more = "" if report or len(summary.broken) <= SHOWN else "; --report FILE lists all"
        raise ViCAError(f"{len(summary.broken)} of {summary.samples} samples are broken{more}{get}")


def printable(text: str) -> str:
    """JSON may hold half a character, which no terminal takes."""
    return text.encode(errors="backslashreplace").decode()
