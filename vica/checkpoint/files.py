"""Plain reading of checkpoint folders: listing their weight files, and reading tensors.

`.bin` files are read as weights only, so a pickle with code in it is refused.
"""

import pickle
from pathlib import Path

import torch
from safetensors import safe_open

from ..utils.errors import ViCAError
from ..utils.files import read_json

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_CONFIG = "adapter_config.json"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


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
