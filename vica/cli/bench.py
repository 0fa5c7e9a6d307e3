"""Measure or count what answers cost, beside transformers and our own slower ways."""

import argparse
from importlib import import_module
from pathlib import Path

from ..bench.options import VERBS, Verb, add_lengths, add_model
from ..checkpoint.folder import find_folder
from ..plan.wiring import Wiring
from ..utils.errors import ViCAError
from ..utils.program import quiet_transformers
from . import common

FROM_ZERO = ("prefix", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, verb in VERBS.items():
        add_verb(verbs.add_parser(name, help=verb.summary, description=verb.summary, epilog=verb.epilog), verb)


def add_verb(parser: argparse.ArgumentParser, verb: Verb) -> None:
    add_model(parser)
    group = parser.add_argument_group("what is measured")
    if verb.one_length:
        add_lengths(group)
    verb.add_arguments(group)
    common.add_wiring(parser, variant="accel")
    output = parser.add_argument_group("output: tables, and a JSON object as the last line")
    output.add_argument("--json", metavar="FILE", help="the JSON object goes here too")
    output.add_argument("--commit", help="where the code is no git checkout: what commit it is of")
    if verb.plots:
        output.add_argument("--plot", metavar="FILE.png", help="time against batch and visual tokens")
    common.add_logging(parser)


def run(args: argparse.Namespace) -> None:
    check_files(args)
    if args.model:
        find_folder(args.model, weights=False)  # a wrong path is told at once
    from ..bench import models, plot, report
    from ..loading import check_device

    verb = VERBS[args.what]
    module = import_module(f"..bench.{verb.module}", __package__)
    settle(args, verb.cuda if check_device(args.device).type == "cuda" else verb.cpu)
    if getattr(args, "plot", None):
        plot.require()
    quiet_transformers()
    wiring = Wiring.of_flags(args)
    if args.what == "flops":
        config, dtype = models.read_config(args, wiring), None
        found = module.run(args, config)
    else:
        measured = models.Models.of(args, wiring)
        config, dtype = measured.config, str(measured.dtype).removeprefix("torch.")
        found = module.run(args, measured)

    what = dict(verb=args.what, model=args.model or args.preset, random_weights=args.model is None, dtype=dtype,
                t2v_layers=config.t2v_layers, freeze_prefix=config.freeze_prefix)  # fmt: skip
    about = report.origin(args.commit)
    print(report.heading(about, what), *found.sections, sep="\n\n", end="\n\n")
    text = report.as_json(about, {**what, **found.figures})
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    if getattr(args, "plot", None):
        plot.save_plot(args.plot, found.figures["cells"], report.title(about, what))
    if found.failures:
        raise ViCAError(f"{len(found.failures)} of our own columns failed; {found.failures[0]}")


def settle(args: argparse.Namespace, defaults: dict) -> None:
    """Fills in the device's defaults, and refuses numbers that mean nothing."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, value in vars(args).items():
        for one in value if isinstance(value, list) else [value]:
            if type(one) is int and one < (0 if name in FROM_ZERO else 1):
                raise ViCAError(
                    f"--{name.replace('_', '-')} is {one}; it must be at least {0 if name in FROM_ZERO else 1}"
                )


def check_files(args: argparse.Namespace) -> None:
    """Before minutes of measuring, not after."""
    for path in (args.json, getattr(args, "plot", None)):
        if path and not Path(path).absolute().parent.is_dir():
            raise ViCAError(f"{path}: there is no folder {Path(path).parent}")
    if getattr(args, "plot", None):
        if not args.plot.endswith(".png"):
            raise ViCAError(f"--plot is {args.plot!r}; it must end in .png")
