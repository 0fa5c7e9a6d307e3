"""LoRA adapters in checkpoints: finding their base, reading them, and merging them into it."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..plan.config import ViCAConfig
from ..utils.errors import ViCAError
from ..utils.files import read_json
from . import files
from .folder import NON_LORA_FILE
from .source import Source, check_weights

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def peft() -> ModuleType:
    """Returns the package peft, which only adapters need."""
    try:
        import peft
    except ImportError as error:
        raise ViCAError("adapters need peft: pip install 'vica[train]'") from error
    return peft


def is_adapter(name: str) -> bool:
    return "lora_" in name


def base_of(folder: Path) -> str:
    """Returns the name of the model that the adapters were trained on, as their config tells it."""
    name: str | None = read_json(folder / files.ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        raise ViCAError(f"{folder / files.ADAPTER_CONFIG} does not name its base model: give --base")
    return name


def merged_weights(model_class: Any, folder: Path, base: Source, config: ViCAConfig) -> dict[str, torch.Tensor]:
    """Returns a whole model's state dict in the base's precision: the base's weights, those that learned in full in
    their place, and the adapters added.

    `base` may be a plain language model, and `folder`, which holds the adapters, may be LLaVA's.
    """
    adapters = read_adapters(folder)
    weights = base.tensors(config) | read_others(folder)
    check_weights(model_class, config, weights, f"{folder} on {base.folder}")
    dtype = weights["model.embed_tokens.weight"].dtype
    model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    settings = peft().PeftConfig.from_pretrained(str(folder))
    settings.exclude_modules = r"(.*\.)?vision_tower\..*"  # LLaVA names layers that the tower has too
    try:
        model = peft().PeftModel.from_pretrained(model, str(folder), config=settings)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ViCAError(f"the adapters of {folder} do not fit {base.folder}: {reason}") from error
    placed = peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    if wrong := sorted(name for name in adapters.keys() ^ placed.keys() if is_adapter(name)):
        raise ViCAError(f"the adapters of {folder} do not fit {base.folder}: {wrong[0]} is in one of the two only")
    merged: torch.nn.Module = model.merge_and_unload()
    return merged.state_dict()


def read_adapters(folder: Path) -> dict[str, torch.Tensor]:
    path = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if path is None:
        raise ViCAError(f"{folder} holds no {' or '.join(ADAPTER_FILES)}")
    return files.read_file(path)


def read_others(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the weights that learned in full beside the adapters, such as the projector's."""
    path = folder / NON_LORA_FILE
    return {own_name(name): x for name, x in files.read_file(path).items()} if path.is_file() else {}


def own_name(name: str) -> str:
    """Returns a weight's name without what peft adds. How many prefixes it adds depends on how it wrapped the model."""
    bare = re.sub(r"^(base_model\.)?(model\.)*", "", name).replace(".base_layer.", ".")
    return bare if bare.startswith("lm_head.") else f"model.{bare}"
