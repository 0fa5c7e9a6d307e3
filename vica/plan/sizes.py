"""What an image and a token take, by the config alone."""

from ..utils.errors import ViCAError
from .config import ViCAConfig


def kv_bytes(config: ViCAConfig, bytes_each: int = 2) -> tuple[int, int]:
    """Cache bytes of (a visual token, a text token) over all layers."""
    text = config.text_config
    entry = 2 * text.num_key_value_heads * text.head_dim * bytes_each
    holding = sum(p.reads for p in config.plan)
    return entry * holding, entry * text.num_hidden_layers


def visual_tokens(config: ViCAConfig) -> int:
    """Tokens of one image; 0 where the caller brings features and only they know."""
    vision = config.vision_config
    if vision is None:
        return 0
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.mm_vision_select_feature == "cls_patch" and vision.model_type == "clip_vision_model")


def positions(config: ViCAConfig, ids: list[int]) -> int:
    """That a prompt takes: a placeholder as many as its image has visual tokens."""
    return len(ids) + (visual_tokens(config) - 1) * ids.count(config.image_token_index)


def room_for_answer(config: ViCAConfig, prompt: list[int]) -> int:
    """Tokens that the model has positions for, which `generate` alone does not heed."""
    taken, most = positions(config, prompt), config.text_config.max_position_embeddings
    if taken > most:
        raise ViCAError(f"the prompt takes {taken} positions, the model has {most}")
    return most - taken + 1  # the last token takes none
