"""Ask one question about one or more images (or none)."""

import torch

from ..data.images import load_image
from . import common


def add_arguments(parser) -> None:
    parser.add_argument("question")
    parser.add_argument(
        "--image", action="append", default=[], metavar="F", help="file, http(s) or data: URL; again for several"
    )
    common.add_model(parser)
    common.add_generation(parser)


@torch.inference_mode()
def run(args) -> None:
    images = [load_image(x) for x in args.image]  # first, because a wrong path is found sooner than a model is loaded
    model, processor = common.load_for_answers(args)
    options = common.generation_options(args, processor)
    inputs = processor.ask(args.question, images).to(model.device)
    out = model.generate(**inputs, **options)
    print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
