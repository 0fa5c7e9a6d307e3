"""Adapters on the language model: put on, and merged back in."""

from pathlib import Path

import torch
from torch import nn

from ..errors import ViCAError
from ..model import checkpoint
from .saving import NON_LORA_FILE

ADAPTER_CONFIG = "adapter_config.json"


def peft():
    try:
        import peft
    except ImportError as error:
        raise ViCAError("adapters need peft: pip install 'vica[train]'") from error
    return peft


def add_adapters(model, args):
    """On every linear map of the decoder's layers, as LLaVA does."""
    names = {name.rsplit(".", 1)[-1] for name, x in model.model.layers.named_modules() if isinstance(x, nn.Linear)}
    if args.bits < 16:
        model = peft().prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    layers = "|".join(sorted(names))
    config = peft().LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        target_modules=rf"model\.layers\..*\.({layers})",
        task_type="CAUSAL_LM",
    )
    return peft().get_peft_model(model, config)


def is_adapter_folder(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def base_of(folder: Path) -> str:
    """What the adapters were trained on, as they tell it."""
    name = checkpoint.read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        raise ViCAError(f"{folder / ADAPTER_CONFIG} does not name its base model: give --base")
    return name


def merge(model, folder: Path):
    """`model` (of the base) with the folder's adapters merged into its weights, and what else had learned put in."""
    others = checkpoint.read_file(folder / NON_LORA_FILE)
    beginnings = ("base_model.model.", "base_model.")
    state = {}
    for name, tensor in others.items():
        beginning = next((x for x in beginnings if name.startswith(x)), "")
        name = name.removeprefix(beginning)
        state["model." + name if name.startswith(("mm_projector", "vision_tower")) else name] = tensor
    with torch.no_grad():
        result = model.load_state_dict(state, strict=False)
        if result.unexpected_keys:
            raise ViCAError(f"{folder / NON_LORA_FILE} holds {result.unexpected_keys[0]}, which the base model lacks")
        return peft().PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
