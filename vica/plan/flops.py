"""What a plan costs, counted from the config alone: a multiply-add is two FLOPs.

Counted are the linear maps of every token that a layer works on, attention of the pairs that see each other (the causal
half), and the vocabulary's map of tokens that need logits. Norms, rotary and softmax are not counted, nor, as in the
papers, the ranking of a drop: one query's attention and, for rank "own", the keys that it needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .config import ViCAConfig
from .layer import LayerPlan
from .wiring import Wiring


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


def visual_at(plan: Sequence[LayerPlan], first: int) -> list[int]:
    """Returns how many of `first` visual tokens are present in each layer, whether the layer works on them or not."""
    present, counts = first, []
    for layer in plan:
        if layer.drop is not None:
            present = layer.drop.count(first, present)
        counts.append(present)
    return counts


def causal_pairs(tokens: int) -> int:
    """Returns the (query, key) pairs of tokens that each see themselves and those before."""
    return tokens * (tokens + 1) // 2


def attention_flops(config: ViCAConfig, pairs: int) -> int:
    """Returns the FLOPs of both products of one layer's attention, for so many (query, key) pairs."""
    return 2 * 2 * pairs * config.text_config.num_attention_heads * config.text_config.head_dim


def visual_flops(config: ViCAConfig, visual: int, before: int = 0) -> int:
    """Returns the FLOPs of an image's own `visual` tokens behind `before` others, in the whole decoder: all of a layer
    where it updates them, their K/V where text reads them as they are. Text's attention to them counts as text's."""
    layer, total = LayerFlops.of(config), 0
    for plan, present in zip(config.plan, visual_at(config.plan, visual)):
        if plan.updates:
            total += present * layer.whole + attention_flops(config, present * before + causal_pairs(present))
        elif plan.reads:
            total += present * layer.keys_values
    return total


@dataclass(frozen=True)
class PrefillFlops:
    """FLOPs from one prompt's embeddings to its first token. `linear`: the layers' linear maps of every token, and the
    vocabulary's of the last token alone."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def prefill_flops(
    config: ViCAConfig, prefix: int, visual: int, text: int, prefix_kept: bool = False, image_kept: bool = False
) -> PrefillFlops:
    """Counts a prompt of `prefix` tokens, an image of `visual` and `text` more.

    What is kept was computed before: only attention to it is counted. An image can be kept where it is not updated. A
    prompt without an image has no prefix: `visual` 0 counts plain text.
    """
    layer, own = LayerFlops.of(config), 0 if prefix_kept else prefix
    linear, pairs = 2 * config.text_config.hidden_size * config.text_config.vocab_size, 0
    for plan, present in zip(config.plan, visual_at(config.plan, visual)):
        attends = plan.prefix_attends or not visual
        linear += text * layer.whole + own * (layer.whole if attends else layer.whole - layer.queries_output)
        pairs += text * prefix + causal_pairs(text) + (causal_pairs(own) if attends else 0)
        if plan.reads:
            pairs += text * present
        if plan.updates:
            linear += present * layer.whole
            pairs += present * prefix + causal_pairs(present)
        elif plan.reads and not image_kept:
            linear += present * layer.keys_values
    return PrefillFlops(linear, attention_flops(config, pairs))


def sample_flops(config: ViCAConfig, text: int, visual: int, scored: int) -> int:
    """Returns the FLOPs of one forward pass of a training sample through the decoder. Its image counts as if it stood
    before all `text` tokens, of which `scored` have a label and so logits."""
    layer, total = LayerFlops.of(config), 2 * scored * config.text_config.hidden_size * config.text_config.vocab_size
    for plan, present in zip(config.plan, visual_at(config.plan, visual)):
        pairs = causal_pairs(text) + (text * present if plan.reads else 0)
        total += text * layer.whole + attention_flops(config, pairs)
    return total + visual_flops(config, visual)


def dense(config: ViCAConfig) -> ViCAConfig:
    """Returns the config of the same model as plain LLaVA."""
    return Wiring(variant="dense").only_on(config)
