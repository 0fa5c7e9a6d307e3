"""Plain reading of checkpoint folders: finding one, listing its weight files, and reading tensors.

`.bin` files are read as weights only, so a pickle with code in it is refused.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open

from ..utils.errors import ViCAError
from ..utils.files import read_json

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_CONFIG = "adapter_config.json"
NON_LORA_FILE = "non_lora_trainables.bin"  # LLaVA's name for the weights that learned beside adapters
SHARD_SIZE = "5GB"
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def find_folder(path_or_repo: str | os.PathLike, weights: bool = True, **hub_kwargs: Any) -> Path:
    """Returns a local folder as it is, or a hub repository's folder, from the hub's cache or downloaded. Without
    `weights`, only small files are downloaded."""
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or str(path_or_repo).startswith("."):
        raise ViCAError(f"{path_or_repo} is no folder with a checkpoint")
    try:
        found = snapshot_download(str(path_or_repo), allow_patterns=SMALL_FILES, **hub_kwargs)
        kinds = ("*.safetensors", "*.bin")
        for kind in kinds if weights else ():
            if not any(Path(found).glob(kinds[0])):
                snapshot_download(str(path_or_repo), allow_patterns=[kind, NON_LORA_FILE], **hub_kwargs)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ViCAError(f"{path_or_repo} is no folder here and cannot be had from the hub: {reason}") from error
    return Path(found)


def pop_hub_arguments(kwargs: dict) -> dict:
    """Removes the hub's arguments from `kwargs` and returns those that are not None."""
    if kwargs.pop("subfolder", None):
        raise ViCAError("subfolder is not supported; give the folder itself")
    hub = {k: kwargs.pop(k) for k in HUB_ARGUMENTS if k in kwargs}
    return {k: v for k, v in hub.items() if v is not None}


def has_weights(folder: Path) -> bool:
    """Returns whether the folder holds a model's weights, whole or in shards."""
    return any((folder / name).is_file() or index_of(folder, name).is_file() for name in WEIGHT_FILES)


def index_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.index.json"


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of a model's weights."""
    for name in WEIGHT_FILES:
        index = index_of(folder, name)
        if index.is_file():
            files = sorted({folder / x for x in read_json(index).get("weight_map", {}).values()})
            missing = [x.name for x in files if not x.is_file()]
            if missing or not files:
                raise ViCAError(f"{index} names files that are not there: {', '.join(missing) or 'none at all'}")
            return files
        if (folder / name).is_file():
            return [folder / name]
    if holds_adapters(folder):
        raise ViCAError(f"{folder} holds adapters: merge them into their base with vica convert {folder} DST --to vica")
    if (folder / PROJECTOR_FILE).is_file():
        raise ViCAError(
            f"{folder} holds stage 1's projector alone: give it to stage 2 by --pretrain_mm_mlp_adapter {folder}"
        )
    raise ViCAError(f"{folder} holds no weights: neither {' nor '.join(WEIGHT_FILES)}, whole or in shards")


def holds_adapters(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Returns a file's tensors by name, on the CPU, mapped rather than copied where the file's kind allows it."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except pickle.UnpicklingError as error:
        raise ViCAError(f"{path} is refused: it holds more than weights, or is damaged") from error
    except Exception as error:  # a cut file makes the unpickler raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ViCAError(f"{path} is damaged or cut short: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(x, torch.Tensor) for x in weights.values()):
        raise ViCAError(f"{path} is refused: it is not a table of tensors")
    return weights


def is_zip(path: Path) -> bool:
    """Returns whether the file can be mapped. torch's older files are plain pickles, which cannot be."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"
