"""Score a model on benchmarks: LLaVA-1.5's questions, each benchmark's own scorer."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import ViCAError
from ..utils.files import held, one_name
from ..utils.table import table
from . import common

if TYPE_CHECKING:
    from ..data.processor import ViCAProcessor

ROOT = Path("playground/data/eval")
SCHEMA = (
    "summary.json's: what was asked of which model (model, variant, t2v_layers, freeze_prefix, dtype, ...) and "
    "benchmarks, a list of task, title, metric, score, full_score, percent_of_baseline, visual_gflops, questions, "
    "questions_per_s and failed; and files, the paths of the summaries."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "task",
        nargs="+",
        metavar="TASK",
        help="all, or some of: vqav2 gqa sqa textvqa pope mme mmbench mmbench_cn seed",
    )
    common.add_model(parser)
    group = parser.add_argument_group("questions")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=Path, metavar="FOLDER", help=f"holds LLaVA's folders, one a benchmark (default: {ROOT})"
    )
    source.add_argument(
        "--hub", action="store_true", help="the hub's datasets instead, fetched once (HF_HUB_OFFLINE=1: never)"
    )
    group.add_argument("--split", help="of the benchmark, where it has several")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each")
    group.add_argument("--template", metavar="NAME", help="prompt template (default: the checkpoint's)")
    group.add_argument("--image-mode", metavar="MODE", help="pad, resize or crop (default: the checkpoint's)")
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for answers and scores; a run that was stopped goes on there (default: playground/answers/<model>)",
    )
    group.add_argument(
        "--baseline", type=Path, metavar="FILE", help="summary.json of another run, of whose scores percents are told"
    )
    group.add_argument(
        "--allow-errors", action="store_true", help="score although questions failed; they count as wrong"
    )
    group.add_argument("--restart", action="store_true", help="drop the answers that are there")
    group.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="of an answer (default: as LLaVA has it, 128 or 1024)"
    )
    group.add_argument("--max-batch", type=int, metavar="N", help="requests at a time (default: what memory allows)")
    common.add_json(parser, SCHEMA)
    common.add_logging(parser)


def run(args: argparse.Namespace) -> None:
    from ..eval import report
    from ..eval.answering import answerer
    from ..eval.ranks import all_ranks
    from ..eval.run import check_folder, read_questions, run_task
    from ..eval.tasks import choose

    tasks = choose(args.task)
    for name in ("limit", "max_new_tokens", "max_batch"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ViCAError(f"--{name.replace('_', '-')} is {value}; it must be 1 at least")
    if args.max_new_tokens:
        tasks = [replace(task, max_new_tokens=args.max_new_tokens) for task in tasks]
    root = None if args.hub else args.data or ROOT
    questions = {task.name: read_questions(task, root, args.split, args.limit) for task in tasks}
    counts = {name: len(asked) for name, asked in questions.items()}
    baseline = report.read_baseline(args.baseline, counts) if args.baseline else {}  # before a model is loaded
    with all_ranks() as ranks, ExitStack() as folders:
        args.device = ranks.device(args.device)
        model, processor = common.load_for_answers(args)
        out = args.out or Path("playground/answers") / Path(os.path.abspath(args.model)).name
        about = settings(args, model, processor)
        for task in tasks if ranks.first and not args.restart else ():
            check_folder(task, questions[task.name], out / task.name, about)
        for task in tasks if ranks.first else ():
            folders.enter_context(held(out / task.name, "--out FOLDER keeps them apart"))
        ranks.wait()  # the others drop and write nothing in folders that the first has not got
        answer, outcomes = answerer(model, processor, args.max_batch), []
        for task in tasks:
            outcome = run_task(
                task, questions[task.name], answer, out / task.name, about, ranks, args.restart, args.allow_errors
            )
            if outcome is not None:
                outcomes.append(outcome)
                if not args.json:
                    show(outcome)
    if not outcomes:
        return  # another process than the first
    about["baseline"] = args.baseline and str(args.baseline)
    summary = report.summarise(outcomes, about, model.config, baseline)
    summary["benchmarks"] = report.with_earlier(summary["benchmarks"], out / "summary.json", about)
    written = report.save(summary, out)
    if args.json:
        common.print_json(args, {**summary, "files": [str(path) for path in written]})
    else:
        print("\n" + table([report.HEADING, *report.cells(summary)]))
        print(*written)
    if failed := [f"{o.task.name} {len(o.failed)}" for o in outcomes if o.failed and not args.allow_errors]:
        raise ViCAError(
            f"questions without an answer: {', '.join(failed)}; run again to ask them again, or --allow-errors"
        )


def settings(args, model, processor: ViCAProcessor) -> dict:
    """Returns all that answers depend on beside the questions. Call it before an engine fuses the weights."""
    from ..utils.hashing import sample_fingerprint

    config = model.config
    return dict(
        model=one_name(args.model),
        weights=sample_fingerprint(list(model.parameters())),  # a folder's may be trained on, or another model's
        variant=config.variant,
        t2v_layers=config.t2v_layers,
        freeze_prefix=config.freeze_prefix,
        dtype=str(model.dtype).removeprefix("torch."),
        template=processor.conversation,
        image_mode=processor.image_mode,
        split=args.split,
    )


def show(outcome) -> None:
    print(f"\n{outcome.task.title}: {outcome.questions} questions")
    for id, reason in outcome.failed.items():
        print(f"  question {id} failed: {reason}")
    if outcome.score:
        print(table(outcome.score.rows))
    if outcome.submission:
        print(f"to be submitted: {outcome.submission}")
