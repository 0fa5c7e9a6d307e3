"""Entry point: picks the verb, and turns a user's mistake into one line and exit code 1."""

import argparse
import sys

import torch

from ..errors import ViCAError
from . import ask, bench, chat, convert, data, info

VERBS = {"ask": ask, "chat": chat, "info": info, "convert": convert, "data": data, "bench": bench}


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
    args = build_parser().parse_args(argv)
    try:
        VERBS[args.verb].run(args)
    except ViCAError as error:
        print(f"vica {args.verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"vica {args.verb}: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"vica {args.verb}: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
