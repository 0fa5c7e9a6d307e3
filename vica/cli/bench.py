"""Measure or count what answers cost, beside transformers and our own slower ways."""

import argparse
from pathlib import Path

from ..bench import counted, evaluation, latency, memory, models, plot, report, throughput, training
from ..loading import check_device
from ..plan.wiring import Wiring
from ..utils.errors import ViCAError
from ..utils.program import quiet_transformers
from . import common

VERBS = {
    "latency": latency, "throughput": throughput, "eval": evaluation, "memory": memory, "flops": counted,
    "train": training,
}  # fmt: skip
FROM_ZERO = ("prefix", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, module in VERBS.items():
        summary = module.__doc__.strip().splitlines()[0]
        verb = verbs.add_parser(name, help=summary, description=summary, epilog=told(module.DEFAULTS))
        models.add_arguments(verb)
        group = verb.add_argument_group("what is measured")
        if module not in (training, evaluation):  # whose prompts are of many lengths
            group.add_argument(
                "--prefix", type=int, default=35, help="tokens before the image (35, as in LLaVA's prompt)"
            )
            group.add_argument("--text", type=int, default=25, help="tokens after it (25)")
        module.add_arguments(group)
        common.add_wiring(verb, variant="accel")
        output = verb.add_argument_group("output: tables, and a JSON object as the last line")
        output.add_argument("--json", metavar="FILE", help="the JSON object goes here too")
        output.add_argument("--commit", help="where the code is no git checkout: what commit it is of")
        if module is latency:
            output.add_argument("--plot", metavar="FILE.png", help="time against batch and visual tokens")


def told(defaults: dict[str, dict]) -> str:
    """What the device decides, for --help."""
    lists = {device: " ".join(f"--{option(n)} {v}" for n, v in given.items()) for device, given in defaults.items()}
    return f"Defaults on CUDA: {lists['cuda']}. On a CPU: {lists['cpu']}." if lists["cuda"] else ""


def option(name: str) -> str:
    return name.replace("_", "-")


def run(args: argparse.Namespace) -> None:
    module = VERBS[args.what]
    settle(args, module.DEFAULTS[check_device(args.device).type])
    check_files(args)
    quiet_transformers()
    wiring = Wiring.of_flags(args)
    if module is counted:
        subject = models.read_config(args, wiring)
        config, dtype = subject, None
    else:
        subject = models.Models.of(args, wiring)
        config, dtype = subject.config, str(subject.dtype).removeprefix("torch.")
    found = module.run(args, subject)

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
                raise ViCAError(f"--{option(name)} is {one}; it must be at least {0 if name in FROM_ZERO else 1}")


def check_files(args: argparse.Namespace) -> None:
    """Before minutes of measuring, not after."""
    for path in (args.json, getattr(args, "plot", None)):
        if path and not Path(path).absolute().parent.is_dir():
            raise ViCAError(f"{path}: there is no folder {Path(path).parent}")
    if getattr(args, "plot", None):
        if not args.plot.endswith(".png"):
            raise ViCAError(f"--plot is {args.plot!r}; it must end in .png")
        plot.require()
