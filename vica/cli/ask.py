"""Ask one question about one or more images (or none)."""

import argparse

from ..checkpoint.folder import find_folder
from . import common

SCHEMA = (
    "question, images (as given), answer, answer_tokens, finish_reason (stop or length), model, variant, t2v_layers "
    "(null where none are named), freeze_prefix."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question")
    parser.add_argument(
        "--image", action="append", default=[], metavar="F", help="file, http(s) or data: URL; again for several"
    )
    common.add_model(parser)
    common.add_generation(parser)
    common.add_json(parser, SCHEMA)
    common.add_logging(parser)


def run(args: argparse.Namespace) -> None:
    find_folder(args.model, weights=False)  # wrong paths are told before torch is imported and a model loaded
    from ..data.images import load_image

    images = [load_image(x) for x in args.image]
    options = common.generation_options(args)
    from .talk import Talk

    model, processor = common.load_for_answers(args)
    talk = Talk(model, processor, options)
    answer = talk.say(args.question, images, show=not args.json)
    if args.json:
        wiring = {name: getattr(model.config, name) for name in ("variant", "t2v_layers", "freeze_prefix")}
        told = dict(question=args.question, images=args.image, answer=answer, answer_tokens=talk.answer_tokens)
        common.print_json(args, {**told, "finish_reason": talk.finish_reason, "model": args.model, **wiring})
