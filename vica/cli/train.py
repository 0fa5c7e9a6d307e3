"""Train stage 1 (the projector) or stage 2 (projector and language model) on LLaVA's data formats."""

import sys

from ..utils.errors import ViCAError


def add_arguments(parser) -> None:
    """They are transformers' and LLaVA's own, and `vica.train.arguments` reads them."""


def run(argv: list[str]) -> int:
    if {"-h", "--help"}.intersection(argv):
        from ..train.help import format_help  # without torch

        sys.stdout.write(format_help())
        return 0
    try:
        from ..train.run import main
    except ImportError as error:
        raise ViCAError(f"training needs more packages ({error.name}): pip install 'vica[train]'") from error
    return main(argv)
