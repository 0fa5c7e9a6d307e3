"""Show a checkpoint's wiring and what an image costs in it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..checkpoint.folder import find_folder
from ..plan.wiring import Wiring
from ..utils.errors import ViCAError
from . import common

if TYPE_CHECKING:
    from ..plan.config import ViCAConfig

SCHEMA = (
    "model, variant, reading_layers (in which text attends to visual tokens), prefix_layers (in which the prefix "
    "attends), backbone (layers, width, heads, kv_heads, vocabulary), parameters (language, tower, projector: counts), "
    "visual_tokens, visual_flops and dense_visual_flops of an image, kv_bytes_an_image and kv_bytes_a_text_token at "
    "16 bit; where the model has no tower, what an image costs is null."
)
PREFIX = 35  # tokens before the image in LLaVA's v1 prompt


def add_arguments(parser) -> None:
    parser.add_argument("model", metavar="M", help="checkpoint folder or hub repository; only its config.json is read")
    common.add_wiring(parser)
    common.add_json(parser, SCHEMA)
    common.add_logging(parser)


def run(args) -> None:
    config = read(args)
    found = figures(config)
    if args.json:
        common.print_json(args, {"model": args.model, **found})
    else:
        print("\n".join(f"{name:<14}{value}" for name, value in describe(found)))


def read(args) -> ViCAConfig:
    folder, wiring = find_folder(args.model, weights=False), Wiring.of_flags(args)
    from ..checkpoint.source import Source

    source = Source.at(folder, weights=False)
    try:
        return source.config(wiring)
    except ViCAError as error:
        if args.variant or args.t2v_layers or "needs t2v_layers" not in str(error):
            raise
        print(f"note: {error}; shown as dense")
        return source.config(replace(wiring, variant="dense"))


def figures(config: ViCAConfig) -> dict:
    """Returns what SCHEMA lists, but for the model's name."""
    from ..plan.flops import dense, visual_flops
    from ..plan.sizes import kv_bytes, visual_tokens

    text, plan, visual = config.text_config, config.plan, visual_tokens(config)
    image, text_token = kv_bytes(config, visual=visual)
    return dict(
        variant=config.variant,
        reading_layers=[layer for layer, p in enumerate(plan) if p.reads],
        prefix_layers=[layer for layer, p in enumerate(plan) if p.prefix_attends],
        backbone=dict(
            layers=text.num_hidden_layers, width=text.hidden_size, heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads, vocabulary=text.vocab_size,
        ),
        parameters=parameters(config),
        visual_tokens=visual or None,
        visual_flops=visual_flops(config, visual, PREFIX) if visual else None,
        dense_visual_flops=visual_flops(dense(config), visual, PREFIX) if visual else None,
        kv_bytes_an_image=image if visual else None,
        kv_bytes_a_text_token=text_token,
    )  # fmt: skip


def parameters(config: ViCAConfig) -> dict[str, int]:
    """Returns the number of weights of each part that the model has; shared ones count once."""
    import torch

    from ..model.llava import ViCAForConditionalGeneration

    with torch.device("meta"):
        model = ViCAForConditionalGeneration(config)
    language = (model.model.layers, model.model.embed_tokens, model.lm_head)
    parts = {
        "language": [p for part in language for p in part.parameters()],
        "tower": [p for name, p in model.named_parameters() if "vision_tower" in name],
        "projector": [p for name, p in model.named_parameters() if "mm_projector" in name],
    }
    return {name: count(ps) for name, ps in parts.items() if ps}


def describe(found: dict) -> list[tuple[str, str]]:
    """Returns the lines that a reader sees."""
    backbone, visual, reading = found["backbone"], found["visual_tokens"], found["reading_layers"]
    layers = range(backbone["layers"])
    lines = [
        ("variant", found["variant"]),
        ("backbone", "{layers} layers, width {width}, {heads} heads ({kv_heads} for keys), vocabulary {vocabulary}"
                     .format(**backbone)),
        ("text sees", marks(i in reading for i in layers) + f"  {len(reading)} layers"),
        ("prefix", marks(i in found["prefix_layers"] for i in layers) + "  attends where marked"),
        ("parameters", ", ".join(f"{name} {number:,}" for name, number in found["parameters"].items())),
    ]  # fmt: skip
    if found["variant"] == "mask":
        lines.append(("note", "what follows is accel's cost; mask computes and keeps everything, as dense does"))
    if visual:
        ours, full = found["visual_flops"], found["dense_visual_flops"]
        share, a_text_token = 100 * ours / full, found["kv_bytes_a_text_token"]
        lines += [
            ("an image", f"{visual} visual tokens"),
            ("visual FLOPs", f"{ours:.3g} of {full:.3g} dense ({share:.1f}%), after {PREFIX} tokens of text"),
            ("KV bytes", f"{found['kv_bytes_an_image']:,} an image, {a_text_token:,} a text token (16 bit)"),
        ]
    return lines


def marks(flags) -> str:
    return "".join("█" if x else "·" for x in flags)


def count(parameters) -> int:
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())
