"""Entry point: picks the verb, and turns a user's mistake into one line and exit code 1."""

import argparse
import sys

import torch

from ..errors import ViCAError
from . import ask, bench, chat, convert, data, eval, info, train

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
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in VERBS.items():
        summary = module.__doc__.strip().splitlines()[0]
        module.add_arguments(verbs.add_parser(name, help=summary, description=summary))
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["train"]:  # whose flags are dataclasses, with a parser of their own
            return train.run(argv[1:])
        args = build_parser().parse_args(argv)
        VERBS[args.verb].run(args)
    except ViCAError as error:
        print(f"vica {argv[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"vica {argv[0]}: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"vica {argv[0]}: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
