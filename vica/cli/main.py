"""Entry point: picks the verb."""

import argparse
import sys

from .. import __version__
from ..utils.program import exit_status, start_logging
from . import ask, bench, chat, common, convert, data, eval, info, train

VERBS = {
    "ask": ask,
    "chat": chat,
    "info": info,
    "convert": convert,
    "data": data,
    "train": train,
    "eval": eval,
    "bench": bench,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vica", description="Vision-only cross-attention: LLaVA's answers for a fraction of the visual compute."
    )
    parser.add_argument("--version", action="version", version=f"vica {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in VERBS.items():
        summary = str(module.__doc__).strip().splitlines()[0]
        module.add_arguments(verbs.add_parser(name, help=summary, description=summary))
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:  # whose flags are dataclasses, with a parser of their own
        return exit_status("vica train", lambda: train.run(argv[1:]))
    args = build_parser().parse_args(argv)
    start_logging(args.log_level)
    with common.json_alone(args):
        return exit_status(f"vica {args.verb}", lambda: VERBS[args.verb].run(args))


if __name__ == "__main__":
    sys.exit(main())
