"""What a layout costs, counted from the config: multiply-adds times two."""

from dataclasses import dataclass

from .config import ViCAConfig


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one token's linear maps in one decoder layer."""

    keys_values: int
    queries_output: int
    ffn: int

    @classmethod
    def of(cls, config: ViCAConfig) -> "LayerFlops":
        text = config.text_config
        width, head = text.hidden_size, text.head_dim
        keys_values = 2 * 2 * width * text.num_key_value_heads * head
        queries_output = 2 * 2 * width * text.num_attention_heads * head
        return cls(keys_values, queries_output, 2 * 3 * width * text.intermediate_size)

    @property
    def whole(self) -> int:
        return self.keys_values + self.queries_output + self.ffn


def causal_pairs(rows: int) -> int:
    """(query, key) pairs of rows that each see themselves and those before."""
    return rows * (rows + 1) // 2


def attention_flops(config: ViCAConfig, pairs: int) -> int:
    """Both products of one layer's attention, for so many (query, key) pairs."""
    return 2 * 2 * pairs * config.text_config.num_attention_heads * config.text_config.head_dim


def visual_flops(config: ViCAConfig, visual: int, before: int = 0) -> int:
    """FLOPs that one image of `visual` tokens behind `before` others costs the decoder: the rows of its own tokens,
    as a wiring that updates them (dense) or only keeps their K/V (T2V layers) needs. What text spends looking at
    them is text's."""
    layer = LayerFlops.of(config)
    attention = attention_flops(config, visual * before + causal_pairs(visual))
    total = 0
    for plan in config.plan:
        if plan.updates:
            total += visual * layer.whole + attention
        elif plan.reads:
            total += visual * layer.keys_values
    return total


@dataclass(frozen=True)
class PrefillFlops:
    """FLOPs from one prompt's embeddings to its first token. `linear`: the layers' linear maps on every row, and the
    vocabulary's on the last row alone. Norms, rotary and softmax are not counted."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def prefill_flops(
    config: ViCAConfig, prefix: int, visual: int, text: int, prefix_kept: bool = False, image_kept: bool = False
) -> PrefillFlops:
    """A prompt of `prefix` tokens, an image of `visual` and `text` more. What is kept was computed before, and only
    looking at it is counted. No image has no prefix: `visual` 0 counts plain text."""
    layer, own = LayerFlops.of(config), 0 if prefix_kept else prefix
    linear, pairs = 2 * config.text_config.hidden_size * config.text_config.vocab_size, 0
    for plan in config.plan:
        attends = plan.prefix_attends or not visual
        linear += text * layer.whole + own * (layer.whole if attends else layer.whole - layer.queries_output)
        pairs += text * prefix + causal_pairs(text) + (causal_pairs(own) if attends else 0)
        if plan.reads:
            pairs += text * visual
        if plan.updates:
            linear += visual * layer.whole
            pairs += visual * prefix + causal_pairs(visual)
        elif plan.reads and not image_kept:
            linear += visual * layer.keys_values
    return PrefillFlops(linear, attention_flops(config, pairs))


def sample_flops(config: ViCAConfig, text: int, visual: int, scored: int) -> int:
    """One forward pass of a training sample through the decoder, its image taken to stand in front: `text` tokens,
    `scored` of which have a label and so logits."""
    layer, total = LayerFlops.of(config), 2 * scored * config.text_config.hidden_size * config.text_config.vocab_size
    for plan in config.plan:
        pairs = causal_pairs(text) + (text * visual if plan.reads else 0)
        total += text * layer.whole + attention_flops(config, pairs)
    return total + visual_flops(config, visual)


def dense(config: ViCAConfig) -> ViCAConfig:
    return ViCAConfig(**{**config.to_dict(), "variant": "dense"})
