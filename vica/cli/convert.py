"""Rewrite a checkpoint in LLaVA's, transformers' (hf) or our own format, bit for bit. Adapters are merged."""

from ..checkpoint.folder import SHARD_SIZE, find_folder
from ..plan.formats import FORMATS
from ..plan.wiring import Wiring
from ..utils.program import quiet_transformers
from . import common


def add_arguments(parser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint folder or hub repository")
    parser.add_argument("target", metavar="DST", help="folder to write; must not hold anything yet")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--base", metavar="M", help="what SRC's adapters are merged into (default: the one they name)")
    parser.add_argument(
        "--max-shard-size", default=SHARD_SIZE, metavar="SIZE", help=f"of a file of weights (default: {SHARD_SIZE})"
    )
    common.add_wiring(parser)
    common.add_logging(parser)


def run(args) -> None:
    find_folder(args.source, weights=False)  # a wrong path is told at once
    from ..loading import convert

    quiet_transformers()
    settings = vars(Wiring.of_flags(args))
    folder = convert(args.source, args.target, args.to, args.base, args.max_shard_size, **settings)
    print(f"wrote {folder}")
