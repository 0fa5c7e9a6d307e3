"""Show a checkpoint's wiring and what an image costs in it."""

from dataclasses import replace

import torch

from ..checkpoint.source import Source
from ..model.llava import ViCAForConditionalGeneration
from ..plan.config import ViCAConfig
from ..plan.flops import dense, visual_flops
from ..plan.sizes import kv_bytes, visual_tokens
from ..plan.wiring import Wiring
from ..utils.errors import ViCAError
from . import common

PREFIX = 35  # tokens before the image in LLaVA's v1 prompt


def add_arguments(parser) -> None:
    parser.add_argument("model", metavar="M", help="checkpoint folder or hub repository; only its config.json is read")
    common.add_wiring(parser)


def run(args) -> None:
    config = read(args)
    print("\n".join(f"{name:<14}{value}" for name, value in describe(config)))


def read(args) -> ViCAConfig:
    source, wiring = Source.at(args.model, weights=False), Wiring.of_flags(args)
    try:
        return source.config(wiring)
    except ViCAError as error:
        if args.variant or args.t2v_layers or "needs t2v_layers" not in str(error):
            raise
        print(f"note: {error}; shown as dense")
        return source.config(replace(wiring, variant="dense"))


def describe(config: ViCAConfig) -> list[tuple[str, str]]:
    text, plan = config.text_config, config.plan
    with torch.device("meta"):
        model = ViCAForConditionalGeneration(config)
    parts = {
        "language": [
            *model.model.layers.parameters(),
            *model.model.embed_tokens.parameters(),
            *model.lm_head.parameters(),
        ],
        "tower": [p for n, p in model.named_parameters() if "vision_tower" in n],
        "projector": [p for n, p in model.named_parameters() if "mm_projector" in n],
    }
    visual = visual_tokens(config)
    ours, full = visual_flops(config, visual, PREFIX), visual_flops(dense(config), visual, PREFIX)
    image, text_token = kv_bytes(config, visual=visual)
    lines = [
        ("variant", config.variant),
        ("backbone", f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads "
                     f"({text.num_key_value_heads} for keys), vocabulary {text.vocab_size}"),
        ("text sees", marks(p.reads for p in plan) + f"  {sum(p.reads for p in plan)} layers"),
        ("prefix", marks(p.prefix_attends for p in plan) + "  attends where marked"),
        ("parameters", ", ".join(f"{name} {count(ps):,}" for name, ps in parts.items() if ps)),
    ]  # fmt: skip
    if config.variant == "mask":
        lines.append(("note", "what follows is accel's cost; mask computes and keeps everything, as dense does"))
    if visual:
        share = 100 * ours / full
        lines += [
            ("an image", f"{visual} visual tokens"),
            ("visual FLOPs", f"{ours:.3g} of {full:.3g} dense ({share:.1f}%), after {PREFIX} tokens of text"),
            ("KV bytes", f"{image:,} an image, {text_token:,} a text token (16 bit)"),
        ]
    return lines


def marks(flags) -> str:
    return "".join("█" if x else "·" for x in flags)


def count(parameters) -> int:
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())
