"""Vision towers that a checkpoint names and does not hold: their config and their weights."""

import copy
import os
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..plan import formats
from ..plan.config import ViCAConfig
from ..utils.errors import ViCAError
from .files import read_file, weight_files
from .folder import find_folder


def with_tower(config: ViCAConfig, cache_dir: str | os.PathLike | None = None) -> ViCAConfig:
    """Returns `config`, or a copy completed with the config of the tower that it names."""
    name = config.mm_vision_tower
    if config.vision_config is not None or not name:
        return config
    config = copy.deepcopy(config)
    config.vision_config = tower_config(name, cache_dir)
    config.mm_hidden_size = config.vision_config.hidden_size
    return config


def tower_config(name: str, cache_dir: str | os.PathLike | None = None) -> PreTrainedConfig:
    """Returns the tower's own config: known by its name, so that nothing need be downloaded, or from its folder or
    repository."""
    if name in formats.KNOWN_TOWERS:
        return AutoConfig.for_model(**formats.KNOWN_TOWERS[name])
    base = name.rstrip("/").rsplit("/", 1)[-1]
    known = next((sizes for public, sizes in formats.KNOWN_TOWERS.items() if public.endswith("/" + base)), None)
    if known is not None and not Path(name).is_dir():  # a private copy on another machine
        return AutoConfig.for_model(**known)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(find_folder(name, weights=False, cache_dir=cache_dir))
    except Exception as error:  # our own errors, and whatever transformers raises at a broken config
        reason = " ".join(str(error).split())[:200]
        raise ViCAError(f"the vision tower {name!r} that the checkpoint names cannot be read: {reason}") from error
    return getattr(config, "vision_config", config)


def read_tower(name: str, cache_dir: str | os.PathLike | None = None) -> dict[str, torch.Tensor]:
    """Returns the tower's weights under this code base's names, without the text half of a whole CLIP."""
    weights = {}
    for path in weight_files(find_folder(name, cache_dir=cache_dir)):
        for key, tensor in read_file(path).items():
            if not formats.HARMLESS.search(key) and not formats.TEXT_TOWER.match(key):
                weights[formats.TOWER + key.removeprefix("vision_model.")] = tensor
    return weights
