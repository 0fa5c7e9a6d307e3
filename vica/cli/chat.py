"""Talk about images over many turns; answers stream, and what was made of an image is kept between turns."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..checkpoint.folder import find_folder
from ..utils.errors import ViCAError
from . import common

if TYPE_CHECKING:
    from .talk import Talk

HELP = "/image F adds an image to your next message, /reset starts over, /exit ends."


def add_arguments(parser) -> None:
    parser.add_argument("--image", action="append", default=[], metavar="F", help="images of the first message")
    common.add_model(parser)
    common.add_generation(parser)
    common.add_logging(parser)


def run(args) -> None:
    find_folder(args.model, weights=False)  # wrong paths are told before torch is imported and a model loaded
    from ..data.images import load_image

    images = [load_image(x) for x in args.image]
    options = common.generation_options(args)
    from .talk import Talk

    talk = Talk(*common.load_for_answers(args), options)
    if sys.stdin.isatty():
        print(HELP)
    while (line := read_line()) is not None and line.partition(" ")[0] not in ("/exit", "/quit"):
        try:
            images = follow(line, talk, images)
        except ViCAError as error:  # a wrong path, or a conversation grown too long, must not end it
            print(" ".join(str(error).split()), file=sys.stderr)


def read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def follow(line: str, talk: Talk, images: list) -> list:
    """Does what a line says. `images` wait for the next message; so do those returned."""
    from ..data.images import load_image
    from ..data.tokenizer import IMAGE_MARK

    command, _, rest = line.partition(" ")
    if command == "/reset":
        talk.reset()
        return []
    if command == "/image":
        return [*images, load_image(rest.strip())]
    if line.startswith("/"):
        print(HELP, file=sys.stderr)
        return images
    if line:
        talk.say(line.replace(IMAGE_MARK, ""), images)
        return []
    return images
