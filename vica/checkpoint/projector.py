"""Stage 1's projector, saved alone in `mm_projector.bin`."""

import os
from pathlib import Path

import torch
from torch import nn

from ..utils.errors import ViCAError
from .files import PROJECTOR_FILE, read_file


def read_projector(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Returns the weights in stage 1's file, or in the folder that holds it, under this code base's names."""
    path = Path(path)
    path = path / PROJECTOR_FILE if path.is_dir() else path
    if not path.is_file():
        raise ViCAError(f"{path} is no file; stage 1 writes {PROJECTOR_FILE}")
    name = "mm_projector."
    weights = {f"model.{name}{k.split(name)[-1]}": v for k, v in read_file(path).items() if name in k}
    if not weights:
        raise ViCAError(f"{path} holds no weights of a projector, none that is named {name}*")
    return weights


def load_projector(projector: nn.Module, path: str | os.PathLike) -> None:
    """Fills a projector with stage 1's weights."""
    given = {k.removeprefix("model.mm_projector."): v for k, v in read_projector(path).items()}
    wanted = {k: tuple(v.shape) for k, v in projector.state_dict().items()}
    if {k: tuple(v.shape) for k, v in given.items()} != wanted:
        raise ViCAError(
            f"{path} does not fit the model's projector: it holds { {k: list(v.shape) for k, v in given.items()} }, "
            f"wanted { {k: list(v) for k, v in wanted.items()} }"
        )
    projector.load_state_dict(given)
