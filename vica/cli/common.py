"""Arguments and steps that several verbs share."""

import argparse

from ..data.processor import ViCAProcessor
from ..engine import Request
from ..loading import load_wired
from ..model.llava import ViCAForConditionalGeneration
from ..plan.vica import VARIANTS
from ..plan.wiring import Wiring
from ..utils.errors import ViCAError
from ..utils.program import DEFAULT, quiet_transformers


def add_wiring(parser: argparse.ArgumentParser, variant: str | None = None) -> None:
    """`variant` given: the verb leaves no choice of it."""
    group = parser.add_argument_group("wiring (default: as the checkpoint says)")
    if variant is None:
        group.add_argument("--variant", choices=VARIANTS)
    parser.set_defaults(variant=variant)
    group.add_argument("--t2v-layers", metavar="LIST", help='a JSON list such as "[0,1,7,8]"; goes before T2V_LAYERS')
    group.add_argument("--freeze-prefix", metavar="RULE", help="true, false, or the first layer that freezes it")
    group.add_argument(
        "--config", metavar="FILE", help="a file of configs/: layers and prefix rule of a published model"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="checkpoint folder or hub repository")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--dtype", help="float32, float16, bfloat16 (default: the checkpoint's)")
    add_wiring(parser)


def add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=int, default=Request.max_new_tokens, metavar="N", help=DEFAULT)
    group.add_argument("--temperature", type=float, default=Request.temperature, help=f"0: greedy {DEFAULT}")
    group.add_argument("--top-p", type=float, default=Request.top_p, help=DEFAULT)
    group.add_argument("--top-k", type=int, default=Request.top_k, help=f"0: all tokens {DEFAULT}")
    group.add_argument("--seed", type=int, default=0, help=DEFAULT)
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; again for several"
    )
    group.add_argument("--template", metavar="NAME", help="prompt template (default: the checkpoint's)")
    group.add_argument("--image-mode", metavar="MODE", help="pad, resize or crop (default: the checkpoint's)")


def load_for_answers(args: argparse.Namespace) -> tuple[ViCAForConditionalGeneration, ViCAProcessor]:
    quiet_transformers()
    model, processor = load_wired(args.model, Wiring.of_flags(args), args.device, args.dtype)
    if processor is None:
        raise ViCAError(f"{args.model} holds no tokenizer, so it cannot be asked anything")
    return model, processor.changed(args.template, args.image_mode)


def generation_options(args: argparse.Namespace) -> dict:
    """What `add_generation` asks for, as settings of a Request."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    options = {name: getattr(args, name) for name in names}
    Request([], **options).check()
    return options
