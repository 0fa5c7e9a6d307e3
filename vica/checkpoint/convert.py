"""Rewriting a checkpoint in another of the three formats."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import ProcessorMixin

from ..plan import formats
from ..plan.config import ViCAConfig
from ..utils.errors import ViCAError
from ..utils.files import whole_folder
from . import generation
from .folder import SHARD_SIZE

log = logging.getLogger(__name__)


def convert(
    read: Callable[[], dict[str, torch.Tensor]],
    origin: Path,
    target: str | os.PathLike,
    to: str,
    config: ViCAConfig,
    processor: ProcessorMixin | None = None,
    image_token: int | None = None,
    shard_size: str = SHARD_SIZE,
) -> Path:
    """Writes a whole model in another format, bit for bit, and returns the folder, which appears whole or not at all.

    `read` returns the weights. The folder `origin` holds what else belongs to the checkpoint. `image_token` is the
    placeholder's id in the hf format, where `processor` has one already.
    """
    target = Path(target)
    with whole_folder(target) as partial:
        weights = read()
        config.dtype = weights["model.embed_tokens.weight"].dtype
        write_model(partial, config, weights, to, image_token, shard_size)
        if processor is not None:
            processor.save_pretrained(partial)
            vocabulary = origin / "tokenizer.model"  # LLaVA's loader reads only this, and LlavaProcessor omits it
            if vocabulary.is_file() and not (partial / vocabulary.name).exists():
                shutil.copyfile(vocabulary, partial / vocabulary.name)
        if generation.read_generation(origin) is not None:
            shutil.copyfile(origin / generation.FILE, partial / generation.FILE)
    return target


def write_model(
    folder: Path,
    config: ViCAConfig,
    weights: dict[str, torch.Tensor],
    to: str,
    image_token: int | None,
    shard_size: str,
) -> None:
    """Writes config.json and the weights in the format `to`."""
    if config.tie_word_embeddings:
        weights = {k: v for k, v in weights.items() if k != "lm_head.weight"}
    if to == "hf":
        settings, weights = to_hf(config, weights, image_token)
    elif to == "llava":
        settings = formats.llava_config(config)
        if "mm_vision_tower" not in settings:
            log.warning("the config names no mm_vision_tower: LLaVA's own loader needs one, set it in config.json")
    else:
        settings = config.to_diff_dict()
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_torch_state_dict(weights, folder, max_shard_size=shard_size)


def to_hf(
    config: ViCAConfig, weights: dict[str, torch.Tensor], image_token: int | None
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Returns config.json and the weights in the hf format."""
    tower = config.vision_config.model_type if config.vision_config is not None else None
    if tower not in formats.CLASS_TOKENS or config.mm_projector_type != "mlp2x_gelu":
        raise ViCAError("the hf format holds a CLIP or SigLIP tower and an mlp2x_gelu projector; this model lacks one")
    vocab = config.text_config.vocab_size
    if image_token is None:
        image_token = config.image_token_index if config.image_token_index >= 0 else vocab
    if image_token >= vocab:  # transformers embeds the placeholder before it replaces it; room for a pad token too
        vocab = -(-(image_token + 2) // 64) * 64
    weights = {formats.hf_name(k): pad_vocabulary(k, v, vocab) for k, v in weights.items()}
    return formats.hf_config(config, vocab, image_token), weights


def pad_vocabulary(key: str, tensor: torch.Tensor, vocab: int) -> torch.Tensor:
    """Returns the weight; an embedding gets its mean in the rows that `vocab` needs in addition."""
    if key not in ("model.embed_tokens.weight", "lm_head.weight") or len(tensor) == vocab:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(vocab - len(tensor), -1)])
