"""Writes the output of a stage so that a folder appears whole, or not at all."""

import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from ..checkpoint.adapters import is_adapter
from ..checkpoint.files import PROJECTOR_FILE, holds_adapters
from ..checkpoint.folder import NON_LORA_FILE
from ..utils.errors import ViCAError
from .stages import Trained, part_of

UNFINISHED = "unfinished"  # inside the output folder; a run that is killed while it saves leaves it behind
TRAINED_FILE = "trained.safetensors"
MODEL_FILES = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def write_trained(folder: Path, model, state: dict[str, torch.Tensor], with_adapters: bool) -> None:
    """Writes the trained weights of stage 1 or of adapters twice: as a resumable checkpoint and in LLaVA's files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / TRAINED_FILE)
    if with_adapters:
        adapters = {name: tensor for name, tensor in state.items() if is_adapter(name)}
        model.save_pretrained(folder, state_dict=adapters, save_embedding_layers=False)
        torch.save({k: v for k, v in state.items() if not is_adapter(k)}, folder / NON_LORA_FILE)
    else:
        projector = {k: v for k, v in state.items() if part_of(k) == "projector"}
        torch.save(projector, folder / PROJECTOR_FILE)


def read_trained(folder: Path, model) -> None:
    path = Path(folder) / TRAINED_FILE
    if not path.is_file():
        raise ViCAError(f"{folder} holds no {TRAINED_FILE}: it is no checkpoint of this stage")
    result = model.load_state_dict(load_file(path), strict=False)
    if result.unexpected_keys:
        raise ViCAError(f"{path} holds {result.unexpected_keys[0]}, which this model lacks: another stage wrote it")


def check_output(folder: Path, base: str, trained: Trained) -> None:
    """Refuses a folder with files of another kind, which stay beside the new files and would be read in their place."""
    if Path(base).is_dir() and folder.samefile(base):
        raise ViCAError(f"--output_dir {folder} is the model that training starts from: give it another")
    if get_last_checkpoint(folder) is not None:  # the run resumes from it, or is refused with the reason
        return
    adapters, model = holds_adapters(folder), any(MODEL_FILES.fullmatch(path.name) for path in folder.iterdir())
    if adapters and not trained.adapters:
        raise ViCAError(f"{folder} holds adapters already: give this run another --output_dir")
    if model and not trained.whole:
        raise ViCAError(f"{folder} holds a whole model already: give this run another --output_dir")


def clear_unfinished(output_dir: str | os.PathLike) -> None:
    shutil.rmtree(Path(output_dir) / UNFINISHED, ignore_errors=True)


def publish(source: Path, target: Path) -> None:
    """Moves a finished folder to its name. Its files reach the disk first: after a power cut a rename may be there
    without their contents."""
    sync(source)
    if target.exists():
        retire(target)
    os.rename(source, target)
    sync_folder(target.parent)


def rotate(output_dir: str | os.PathLike, limit: int | None) -> None:
    """Keeps the newest `limit` checkpoints; all if it is None or 0."""
    if limit is not None and limit > 0:
        for old in sort_checkpoints(str(output_dir))[:-limit]:
            retire(Path(old))


def retire(folder: Path) -> None:
    """Removes a folder whole or not at all: a kill must not leave half a checkpoint under its name."""
    discarded = folder.parent / UNFINISHED / f"old-{folder.name}"
    discarded.parent.mkdir(exist_ok=True)
    os.rename(folder, discarded)
    shutil.rmtree(discarded)


def publish_files(source: Path, target: Path) -> None:
    """Moves finished files into a folder that holds others, and removes an earlier model's index and shards: they would
    be read in place of the new ones."""
    sync(source)
    written = {path.name for path in source.iterdir()}
    for name in sorted(written):
        os.replace(source / name, target / name)
    if any(map(MODEL_FILES.fullmatch, written)):
        for path in target.iterdir():
            if MODEL_FILES.fullmatch(path.name) and path.name not in written:
                path.unlink()
    source.rmdir()
    sync_folder(target)


def sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
