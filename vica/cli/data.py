"""Check training data: read every record and image once, and say what is broken."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.folder import find_folder
from ..data.conversation import get_template
from ..data.sources import where_images_from
from ..plan.wiring import Wiring
from ..utils.errors import ViCAError
from ..utils.program import quiet_transformers
from ..utils.progress import progress
from . import common

if TYPE_CHECKING:
    from ..data.check import Summary
    from ..data.processor import ViCAProcessor

SHOWN = 10
SHARES = {"shortest": 0, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1}
SCHEMA = (
    "samples, broken (a list of id and reason), with_image, images, text_only, turns, ids (different ones), ids_twice "
    "(that come more than once), and with --model positions, lengths (shortest, median, 90%, 99%, longest), learned "
    "(tokens with a label), model_max_length, too_long (samples that training cuts); without it these are null."
)


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
    common.add_json(verb, SCHEMA.replace("%", "%%"))
    common.add_logging(verb)


def run(args: argparse.Namespace) -> None:
    get_template(args.template)
    if args.workers < 0:
        raise ViCAError(f"--workers is {args.workers}; it must be at least 0")
    if args.report:
        Path(args.report).write_text("")  # before hours of reading, not after
    if args.model:
        find_folder(args.model, weights=False)  # a wrong path is told at once
    from ..data.check import Check, Summary
    from ..data.samples import open_samples

    processor, an_image = read_processor(args.model) if args.model else (None, 1)
    check = Check(open_samples(args.files), args.image_folder, processor, args.template, an_image)
    summary = Summary()
    for found in progress(check.findings(args.workers), len(check), "samples"):
        summary.add(found)
    counted = figures(summary, args.model_max_length if args.model else None)
    if args.json:
        common.print_json(args, counted)
    else:
        print("\n".join(f"{name:<14}{value}" for name, value in describe(counted)))
    tell_broken(summary, args.report, listed=not args.json)


def read_processor(model: str) -> tuple[ViCAProcessor, int]:
    """Returns the processor, and the positions that an image takes."""
    from ..checkpoint.source import Source
    from ..loading import load_processor
    from ..plan.sizes import visual_tokens

    quiet_transformers()
    source = Source.at(model, weights=False)
    config = source.config(Wiring(variant="dense"))  # for which a checkpoint need not name its layers
    processor = load_processor(source.folder, config)
    if processor is None:
        raise ViCAError(f"{model} holds no tokenizer")
    return processor, visual_tokens(config) or 1


def figures(summary: Summary, limit: int | None) -> dict:
    """Returns what SCHEMA lists. `limit`: --model-max-length; None where nothing was tokenized."""
    sound, lengths = summary.samples - len(summary.broken), sorted(summary.lengths)
    counted = dict(
        samples=summary.samples,
        broken=[dict(id=broken.id, reason=broken.reason) for broken in summary.broken],
        with_image=summary.with_image,
        images=summary.images,
        text_only=sound - summary.with_image,
        turns=summary.turns,
        ids=len(summary.ids),
        ids_twice=sum(times > 1 for times in summary.ids.values()),
    )
    tokenized = dict.fromkeys(("positions", "lengths", "learned", "model_max_length", "too_long"))
    if limit is not None and sound:
        tokenized = dict(
            positions=sum(lengths),
            lengths={name: lengths[int(share * (sound - 1))] for name, share in SHARES.items()},
            learned=summary.learned,
            model_max_length=limit,
            too_long=sum(length > limit for length in lengths),
        )
    return counted | tokenized


def describe(found: dict) -> Iterator[tuple[str, str]]:
    """Yields the lines that a reader sees."""
    yield "samples", f"{found['samples']:,}, of which {len(found['broken']):,} are broken"
    yield "with image", f"{found['with_image']:,} with {found['images']:,} images, {found['text_only']:,} text only"
    yield "turns", f"{found['turns']:,}"
    yield "ids", f"{found['ids']:,}, {found['ids_twice']:,} of them more than once"
    if found["lengths"] is None:
        return
    spread = ", ".join(f"{name} {length:,}" for name, length in found["lengths"].items())
    yield "positions", f"{found['positions']:,}: {spread}"
    yield "learned", f"{found['learned']:,} tokens"
    yield "too long", f"{found['too_long']:,} for --model-max-length {found['model_max_length']:,}: cut in training"


def tell_broken(summary: Summary, report: str | None, listed: bool) -> None:
    """Writes the report, prints the first broken samples if they are to be listed, and raises ViCAError if there are
    any."""
    for broken in summary.broken[:SHOWN] if listed else ():
        print(printable(f"broken: {broken.id}: {broken.reason}"))
    if report:
        lines = [json.dumps({"id": broken.id, "reason": broken.reason}) + "\n" for broken in summary.broken]
        Path(report).write_text("".join(lines))
    if summary.broken:
        get = next((told for broken in summary.broken if (told := where_images_from(broken.reason))), "")
        more = "" if report or not listed or len(summary.broken) <= SHOWN else "; --report FILE lists all"
        raise ViCAError(f"{len(summary.broken)} of {summary.samples} samples are broken{more}{get}")


def printable(text: str) -> str:
    """JSON may hold half a character, which no terminal takes."""
    return text.encode(errors="backslashreplace").decode()
