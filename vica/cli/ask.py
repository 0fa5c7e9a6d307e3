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
    images = [
        load_image(x) for x in args.image
    ]  # before the model, which takes longer to load than a wrong path to find
    model, processor = common.load_for_answers(args)
    options = common.generation_options(args, processor)
    content = [{"type": "image", "image": x} for x in images] + [{"type": "text", "text": args.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    out = model.generate(**inputs, **options)
    print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
