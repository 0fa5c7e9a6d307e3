"""The plans of ViCA and dense, and the settings that choose them: variant, T2V layers, prefix rule."""

import json
from collections.abc import Mapping
from typing import Any

from ..utils.errors import ViCAError
from .layer import LayerPlan

VARIANTS = ("accel", "mask", "dense")

# The layer lists that the authors published, and the prefix rule that each model was trained with. configs/ holds the
# whole recipes.
PUBLISHED = {
    "LLaVA-1.5-3B": ([0, 1, 14, 15, 18, 19, 21, 22, 23], False),
    "LLaVA-1.5-7B": ([0, 1, 7, 8, 9, 10, 11, 14], True),
    "LLaVA-1.5-13B": ([0, 6, 8, 9, 10, 13, 14, 16], False),
}


def make_plan(
    variant: str, num_layers: int, t2v_layers: list[int] | None, freeze_prefix: bool | int
) -> list[LayerPlan]:
    """Returns the plan that the three settings name: dense ignores the other two."""
    if variant == "dense":
        return [LayerPlan()] * num_layers
    frozen_from, reading = first_frozen_layer(freeze_prefix, num_layers), set(t2v_layers or [])
    return [LayerPlan("read" if i in reading else "skip", prefix_attends=i < frozen_from) for i in range(num_layers)]


def first_frozen_layer(freeze_prefix: bool | int, num_layers: int) -> int:
    """Returns the first layer in which prefix tokens get no attention update; `num_layers` where there is none."""
    if isinstance(freeze_prefix, bool):
        return 0 if freeze_prefix else num_layers
    return freeze_prefix


def check_variant(value: Any, num_layers: int, source: str = "variant") -> str:
    """Returns the variant. The number of layers does not matter: every setting's parser takes it."""
    if value not in VARIANTS:
        raise ViCAError(f"{source} is {value!r}; it must be one of {', '.join(VARIANTS)}")
    return str(value)


def parse_t2v_layers(value: Any, num_layers: int, source: str = "t2v_layers") -> list[int]:
    """Returns the sorted layer numbers of a list or of a JSON string. An error names the value and its `source`."""
    layers = value
    if isinstance(value, str):
        try:
            layers = json.loads(value)
        except json.JSONDecodeError:
            layers = None
    allowed = f"a list of different whole numbers from 0 to {num_layers - 1}, such as [0, 1]"
    if not isinstance(layers, (list, tuple)):
        raise ViCAError(f"{source} is {value!r}; it must be {allowed}")
    wrong = [x for x in layers if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < num_layers]
    if wrong:
        raise ViCAError(f"{source} is {value!r}: {wrong[0]!r} is no layer of this model; it must be {allowed}")
    if len(set(layers)) != len(layers):
        twice = next(x for x in layers if list(layers).count(x) > 1)
        raise ViCAError(f"{source} is {value!r}: it names layer {twice} twice; it must be {allowed}")
    return sorted(layers)


def check_freeze_prefix(value: Any, num_layers: int, source: str = "freeze_prefix") -> bool | int:
    """Returns the prefix rule: true, false or the first layer that freezes the prefix."""
    if isinstance(value, bool) or (isinstance(value, int) and 0 <= value <= num_layers):
        return value
    raise ViCAError(f"{source} is {value!r}; it must be true, false or a layer number from 0 to {num_layers}")


def replaces_plan(settings: Mapping[str, Any]) -> bool:
    """Returns whether settings that a caller names replace a custom plan: layers, a prefix rule, or dense do. accel and
    mask follow any plan."""
    wired = (settings.get("t2v_layers"), settings.get("freeze_prefix"))
    return wired != (None, None) or settings.get("variant") == "dense"


def parse_prefix_rule(value: str | None) -> bool | int | None:
    """Returns the value of the flag --freeze-prefix."""
    if value is None:
        return None
    try:
        rule = json.loads(value.lower())
    except ValueError:
        rule = None
    if not isinstance(rule, int):
        raise ViCAError(f"--freeze-prefix is {value!r}; it must be true, false or a layer number")
    return rule


def missing_layers_message(variant: str, num_layers: int) -> str:
    """Returns the error text for a model whose T2V layers nothing names, with the published lists."""
    published = "; ".join(
        f"{name} (freeze_prefix {'on' if frozen else 'off'}): {layers}" for name, (layers, frozen) in PUBLISHED.items()
    )
    return (
        f"variant {variant!r} needs t2v_layers and neither the call, T2V_LAYERS nor the checkpoint names any "
        f"(layers 0 to {num_layers - 1}; or take variant 'dense'). Published lists: {published}"
    )
