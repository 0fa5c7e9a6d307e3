"""Rewrite a checkpoint in LLaVA's, transformers' (hf) or our own layout, bit for bit. Adapters are merged."""

from ..loading import LAYOUTS, convert
from . import common


def add_arguments(parser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint folder or hub repository")
    parser.add_argument("target", metavar="DST", help="folder to write; must not hold anything yet")
    parser.add_argument("--to", required=True, choices=LAYOUTS)
    parser.add_argument("--base", metavar="M", help="what SRC's adapters are merged into (default: the one they name)")
    common.add_wiring(parser)


def run(args) -> None:
    print(f"wrote {convert(args.source, args.target, args.to, args.base, **common.wiring(args))}")
