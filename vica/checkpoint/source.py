"""A checkpoint folder, looked at once: its place, its config.json, its format and what kind of checkpoint it is.

Everything is checked before a model is built: every key of the files must be used and every weight of the model filled,
else one error lists the names.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..plan import formats
from ..plan.config import ViCAConfig
from ..plan.wiring import Wiring
from ..utils.errors import ViCAError
from ..utils.files import read_json
from . import files, tower
from .folder import find_folder

log = logging.getLogger(__name__)

LANGUAGE_MODELS = ("llama", "mistral", "qwen2")  # the model types of plain ones, which have no tower and no projector


@dataclass(frozen=True)
class Source:
    """`name` is the folder or repository as the caller wrote it. `raw` is config.json's content. `kind` is "whole",
    "adapters", "projector" or "language model" (a plain one). `cache_dir`: where a tower that is kept apart lies, too.
    """

    name: str
    folder: Path
    raw: dict
    format: str
    kind: str
    cache_dir: str | os.PathLike | None = None

    @classmethod
    def at(cls, path_or_repo: "str | os.PathLike | Source", weights: bool = True, **hub: Any) -> "Source":
        """Returns the checkpoint in a folder or in a repository of the hub. `weights=False` downloads none."""
        if isinstance(path_or_repo, Source):
            return path_or_repo
        folder = find_folder(path_or_repo, weights, **hub)
        raw = read_json(folder / "config.json")
        kind = kind_of(folder, raw)
        format = "llava" if kind == "language model" else formats.format_of(raw)
        return cls(str(path_or_repo), folder, raw, format, kind, hub.get("cache_dir"))

    def config(self, wiring: Wiring | None = None) -> ViCAConfig:
        """Returns the checkpoint's config, wired as the caller asks."""
        config, wiring = ViCAConfig.from_dict(self.raw), wiring or Wiring()
        config = wiring.on(tower.with_tower(config, self.cache_dir))
        told = "freeze_prefix" in self.raw or wiring.names("freeze_prefix")
        if config.variant != "dense" and not told:
            log.warning(
                "the checkpoint does not say whether its prefix is frozen: freeze_prefix=True is assumed, as in the "
                "published 7B model (the 3B and 13B ones were trained with False: see configs/)"
            )
        return config

    def weights(self, model_class: type[nn.Module], config: ViCAConfig) -> dict[str, torch.Tensor]:
        """Returns a state dict that fits a model of `config`."""
        weights = self.tensors(config)
        check_weights(model_class, config, weights, self.folder)
        return weights

    def tensors(self, config: ViCAConfig) -> dict[str, torch.Tensor]:
        """Returns all tensors, those of a tower kept apart included, unchecked: a plain language model lacks a
        projector."""
        weights = self._own_tensors()
        has_tower = any(k.startswith("model.vision_tower.") for k in weights)
        if config.vision_config is not None and not has_tower and config.mm_vision_tower:
            if self.kind != "language model":
                log.warning("the checkpoint holds no vision tower: reading %s", config.mm_vision_tower)
            weights |= tower.read_tower(config.mm_vision_tower, self.cache_dir)
        return weights

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = {}
        for path in files.weight_files(self.folder):
            for key, tensor in files.read_file(path).items():
                if formats.HARMLESS.search(key):
                    continue
                name = formats.our_name(key, self.format)
                if name in weights:
                    raise ViCAError(f"{path} holds {key} a second time")
                weights[name] = tensor
        return weights


def kind_of(folder: Path, raw: dict) -> str:
    """Returns what kind of checkpoint a folder with this config.json holds."""
    if raw.get("model_type") in LANGUAGE_MODELS:
        return "language model"
    if files.holds_adapters(folder):
        return "adapters"
    alone = (folder / files.PROJECTOR_FILE).is_file() and not files.has_weights(folder)
    return "projector" if alone else "whole"


def check_weights(
    model_class: type[nn.Module], config: ViCAConfig, weights: dict[str, torch.Tensor], source: str | os.PathLike
) -> None:
    """Raises one ViCAError with all names and shapes that do not fit a model of `config`. Adds the output weights of
    tied embeddings."""
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in model_class(config).state_dict().items()}
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    missing = sorted(wanted.keys() - weights.keys())
    unused = sorted(weights.keys() - wanted.keys())
    shapes = [
        f"{k} is {list(v.shape)}, not {list(wanted[k])}"
        for k, v in weights.items()
        if k in wanted and tuple(v.shape) != wanted[k]
    ]
    problems = [
        f"{what}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for what, names in (("missing", missing), ("not of this model", unused), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ViCAError(f"the weights of {source} do not fit its config; {'; '.join(problems)}")
