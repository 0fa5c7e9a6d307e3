"""Train stage 1 (the projector) or stage 2 (projector and language model) on LLaVA's data formats."""

from ..utils.errors import ViCAError


def add_arguments(parser) -> None:
    """They are transformers' and LLaVA's own, and `vica.train.arguments` reads them."""


def run(argv: list[str]) -> int:
    if {"-h", "--help"}.intersection(argv):
        from ..train.help import help_parser  # without torch

        help_parser().parse_args(["--help"])
    try:
        from ..train.run import main
    except ImportError as error:
        raise ViCAError(f"training needs more packages ({error.name}): pip install 'vica[train]'") from error
    return main(argv)
