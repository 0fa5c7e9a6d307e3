"""Ask one question about one or more images (or none)."""

from ..data.images import load_image
from . import common
from .talk import Talk


def add_arguments(parser) -> None:
    parser.add_argument("question")
    parser.add_argument(
        "--image", action="append", default=[], metavar="F", help="file, http(s) or data: URL; again for several"
    )
    common.add_model(parser)
    common.add_generation(parser)


def run(args) -> None:
    options = common.generation_options(args)
    images = [load_image(x) for x in args.image]  # first, because a wrong path is found sooner than a model is loaded
    Talk(*common.load_for_answers(args), options).say(args.question, images)
