"""What a layout costs, counted from the config: multiply-adds times two, and bytes of cache."""

from dataclasses import dataclass

from ..model.config import ViCAConfig


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one token's linear maps in one decoder layer."""

    keys_values: int
    whole: int  # q, k, v, o and the FFN

    @classmethod
    def of(cls, config: ViCAConfig) -> "LayerFlops":
        text = config.text_config
        width, head = text.hidden_size, text.head_dim
        keys_values = 2 * 2 * width * text.num_key_value_heads * head
        queries_output = 2 * 2 * width * text.num_attention_heads * head
        return cls(keys_values, keys_values + queries_output + 2 * 3 * width * text.intermediate_size)


def visual_flops(config: ViCAConfig, visual: int, before: int = 0) -> int:
    """FLOPs that one image of `visual` tokens behind `before` others costs the decoder: the rows of its own tokens,
    as a wiring that updates them (dense) or only keeps their K/V (T2V layers) needs. What text spends looking at
    them is text's."""
    layer = LayerFlops.of(config)
    text = config.text_config
    pairs = visual * before + visual * (visual + 1) // 2  # causal (query, key) pairs of visual queries
    attention = 2 * 2 * pairs * text.num_attention_heads * text.head_dim
    total = 0
    for plan in config.plan:
        if plan.visual_updated:
            total += visual * layer.whole + attention
        elif plan.text_sees_visual:
            total += visual * layer.keys_values
    return total


def dense(config: ViCAConfig) -> ViCAConfig:
    return ViCAConfig(**{**config.to_dict(), "variant": "dense"})


def kv_bytes(config: ViCAConfig, bytes_each: int = 2) -> tuple[int, int]:
    """Cache bytes of (a visual token, a text token) over all layers."""
    text = config.text_config
    entry = 2 * text.num_key_value_heads * text.head_dim * bytes_each
    holding = sum(p.text_sees_visual for p in config.plan)
    return entry * holding, entry * text.num_hidden_layers


def visual_tokens(config: ViCAConfig) -> int:
    """Tokens of one image; 0 where the caller brings features and only they know."""
    vision = config.vision_config
    if vision is None:
        return 0
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.mm_vision_select_feature == "cls_patch" and vision.model_type == "clip_vision_model")
