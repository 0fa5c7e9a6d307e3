"""How many tokens an image has, and how many positions and cache bytes tokens take, by the config alone."""

from ..utils.errors import ViCAError
from .config import ViCAConfig
from .flops import visual_at


def kv_bytes(config: ViCAConfig, bytes_each: int = 2, visual: int = 1) -> tuple[int, int]:
    """Returns the cache bytes of (an image of `visual` tokens, a text token) over all layers. Layers whose plan drops
    tokens hold fewer: give the image's true size there."""
    text, plan = config.text_config, config.plan
    entry = 2 * text.num_key_value_heads * text.head_dim * bytes_each
    held = sum(present for layer, present in zip(plan, visual_at(plan, visual)) if layer.updates or layer.reads)
    return entry * held, entry * text.num_hidden_layers


def visual_tokens(config: ViCAConfig) -> int:
    """Returns how many tokens an image has; 0 where the caller brings features, as only they tell."""
    vision = config.vision_config
    if vision is None:
        return 0
    side: int = vision.image_size // vision.patch_size
    return side**2 + (config.mm_vision_select_feature == "cls_patch" and vision.model_type == "clip_vision_model")


def positions(config: ViCAConfig, ids: list[int]) -> int:
    """Returns how many positions a prompt takes: a placeholder takes one for each visual token of its image."""
    return len(ids) + (visual_tokens(config) - 1) * ids.count(config.image_token_index)


def room_for_answer(config: ViCAConfig, prompt: list[int]) -> int:
    """Returns how many tokens may follow a prompt before the model runs out of positions. `generate` does not check."""
    taken, most = positions(config, prompt), config.text_config.max_position_embeddings
    if taken > most:
        raise ViCAError(f"the prompt takes {taken} positions, the model has {most}")
    return most - taken + 1  # the last token takes none
