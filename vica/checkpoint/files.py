"""Reading and writing checkpoints of all three layouts (layouts.py says what differs between them).

Everything is checked before a model is built: every key of the files must be used and every weight of the model
filled, else one error lists the names. `.bin` files are read as weights only, so a pickle with code in it is refused.
"""

import copy
import json
import logging
import os
import pickle
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig

from ..plan import formats
from ..plan.config import ViCAConfig
from ..plan.vica import parse_t2v_layers
from ..utils.errors import ViCAError
from .folder import NON_LORA_FILE, SHARD_SIZE, find_folder  # noqa: F401

log = logging.getLogger(__name__)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_CONFIG = "adapter_config.json"
LANGUAGE_MODELS = ("llama", "mistral", "qwen2")  # model types of a plain one's config.json
RECIPE = {"t2v_layers", "freeze_prefix"}  # of which a file of configs/ names one at least


# --- folders ------------------------------------------------------------------------------------------------------


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def pop_hub_arguments(kwargs: dict) -> dict:
    hub = {k: kwargs.pop(k) for k in HUB_ARGUMENTS if k in kwargs}
    return {k: v for k, v in hub.items() if v is not None}


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ViCAError(f"{path.parent} holds no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ViCAError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ViCAError(f"{path} holds a {type(content).__name__}, not a table of settings")
    return content


def read_recipe(path: str | os.PathLike) -> dict:
    """A file of configs/."""
    if not Path(path).is_file():
        raise ViCAError(f"config {str(path)!r} is no file; configs/ holds those of the published models")
    recipe = read_json(Path(path))
    if not RECIPE.intersection(recipe):
        raise ViCAError(f"config {str(path)!r} is none of a model: it names neither {' nor '.join(sorted(RECIPE))}")
    return recipe


# --- settings -----------------------------------------------------------------------------------------------------


def read_config(folder: Path, **settings) -> ViCAConfig:
    raw = read_json(folder / "config.json")
    config = apply_settings(ViCAConfig.from_dict(raw), **settings)
    told = "freeze_prefix" in raw or settings.get("freeze_prefix") is not None or settings.get("recipe") is not None
    if config.variant != "dense" and not told:
        log.warning(
            "the checkpoint does not say whether its prefix is frozen: freeze_prefix=True is assumed, as in the "
            "published 7B model (the 3B and 13B ones were trained with False: see configs/)"
        )
    return config


def apply_settings(
    config: ViCAConfig,
    variant: str | None = None,
    t2v_layers=None,
    freeze_prefix=None,
    recipe: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> ViCAConfig:
    """The caller's wishes on top of a checkpoint's settings. Layers: argument, then `recipe` (a file of configs/), then
    T2V_LAYERS, then the checkpoint. `cache_dir`: where a tower of the hub's is kept."""
    if config.vision_config is None and config.mm_vision_tower:
        config.vision_config = tower_config(config.mm_vision_tower, cache_dir)
        config.mm_hidden_size = config.vision_config.hidden_size
    if recipe is not None:
        named = read_recipe(recipe)
        t2v_layers = named.get("t2v_layers") if t2v_layers is None else t2v_layers
        config.freeze_prefix = named.get("freeze_prefix", config.freeze_prefix)
    config.variant = variant or config.variant
    config.freeze_prefix = config.freeze_prefix if freeze_prefix is None else freeze_prefix
    config.t2v_layers = choose_layers(t2v_layers, config)
    config.check()
    config.require_layers()
    return config


def choose_layers(argument, config: ViCAConfig) -> list[int] | None:
    num_layers = config.text_config.num_hidden_layers
    if argument is not None:
        return parse_t2v_layers(argument, num_layers)
    if os.environ.get("T2V_LAYERS"):
        return parse_t2v_layers(os.environ["T2V_LAYERS"], num_layers, source="T2V_LAYERS")
    return config.t2v_layers


def tower_config(name: str, cache_dir: str | os.PathLike | None = None):
    """The tower's own config: from its folder or repository, or known by name so that none need be fetched."""
    if name in formats.KNOWN_TOWERS:
        return AutoConfig.for_model(**formats.KNOWN_TOWERS[name])
    base = name.rstrip("/").rsplit("/", 1)[-1]
    known = next((sizes for public, sizes in formats.KNOWN_TOWERS.items() if public.endswith("/" + base)), None)
    if known is not None and not Path(name).is_dir():  # somebody's private copy
        return AutoConfig.for_model(**known)
    try:
        config = AutoConfig.from_pretrained(find_folder(name, weights=False, cache_dir=cache_dir))
    except Exception as error:  # our own errors, and whatever transformers raises at a broken config
        reason = " ".join(str(error).split())[:200]
        raise ViCAError(f"the vision tower {name!r} that the checkpoint names cannot be read: {reason}") from error
    return getattr(config, "vision_config", config)


# --- weights ------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
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
    """Tensors by name, on the CPU, mapped rather than copied where the format allows."""
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
    """torch's older files are plain pickles, which cannot be mapped."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All of a folder's tensors under the names of this code base, harmless buffers left out."""
    raw = read_json(folder / "config.json")
    layout = "llava" if is_language_model(raw) else formats.layout_of(raw)
    weights: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        for key, tensor in read_file(path).items():
            if formats.HARMLESS.search(key):
                continue
            name = formats.our_name(key, layout)
            if name in weights:
                raise ViCAError(f"{path} holds {key} a second time")
            weights[name] = tensor
    return weights


def is_language_model(raw: dict) -> bool:
    """Whether a config.json is that of a plain language model, with neither tower nor projector."""
    return raw.get("model_type") in LANGUAGE_MODELS


def read_tower(name: str, cache_dir: str | os.PathLike | None = None) -> dict[str, torch.Tensor]:
    """Weights of a tower kept apart from the language model. A whole CLIP's text half is left out."""
    weights = {}
    for path in weight_files(find_folder(name, cache_dir=cache_dir)):
        for key, tensor in read_file(path).items():
            if not formats.HARMLESS.search(key) and not formats.TEXT_TOWER.match(key):
                weights[formats.TOWER + key.removeprefix("vision_model.")] = tensor
    return weights


def check_weights(model_class, config: ViCAConfig, weights: dict[str, torch.Tensor], source) -> None:
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


def read_checkpoint(
    model_class, folder: Path, config: ViCAConfig, cache_dir: str | os.PathLike | None = None
) -> dict[str, torch.Tensor]:
    """A checked state dict for `config`."""
    weights = read_with_tower(folder, config, cache_dir)
    check_weights(model_class, config, weights, folder)
    return weights


def read_with_tower(
    folder: Path, config: ViCAConfig, cache_dir: str | os.PathLike | None = None
) -> dict[str, torch.Tensor]:
    """Unchecked, because a plain language model still lacks a projector."""
    weights = read_weights(folder)
    has_tower = any(k.startswith("model.vision_tower.") for k in weights)
    if config.vision_config is not None and not has_tower and config.mm_vision_tower:
        if not is_language_model(read_json(folder / "config.json")):
            log.warning("the checkpoint holds no vision tower: reading %s", config.mm_vision_tower)
        weights |= read_tower(config.mm_vision_tower, cache_dir)
    return weights


def read_projector(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Stage 1's `mm_projector.bin` (or that of a folder), under the names of this code base."""
    path = Path(path)
    path = path / PROJECTOR_FILE if path.is_dir() else path
    if not path.is_file():
        raise ViCAError(f"{path} is no file; stage 1 writes {PROJECTOR_FILE}")
    name = "mm_projector."
    weights = {f"model.{name}{k.split(name)[-1]}": v for k, v in read_file(path).items() if name in k}
    if not weights:
        raise ViCAError(f"{path} holds no weights of a projector, none that is named {name}*")
    return weights


def load_projector(model, path: str | os.PathLike) -> None:
    given = {k.removeprefix("model.mm_projector."): v for k, v in read_projector(path).items()}
    wanted = {k: tuple(v.shape) for k, v in model.model.mm_projector.state_dict().items()}
    if {k: tuple(v.shape) for k, v in given.items()} != wanted:
        raise ViCAError(
            f"{path} does not fit the model's projector: it holds { {k: list(v.shape) for k, v in given.items()} }, "
            f"wanted { {k: list(v) for k, v in wanted.items()} }"
        )
    model.model.mm_projector.load_state_dict(given)


def generation_config(folder: Path) -> GenerationConfig | None:
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    settings = read_json(file)
    try:
        return GenerationConfig.from_dict(settings)
    except (ValueError, TypeError) as error:
        raise ViCAError(f"{file} is no generation config: {' '.join(str(error).split())}") from error


def savable(generation: GenerationConfig) -> GenerationConfig:
    """transformers refuses to write what greedy decoding does not use, such as Vicuna's temperature."""
    if generation.do_sample:
        return generation
    greedy = copy.deepcopy(generation)
    greedy.temperature = greedy.top_p = greedy.top_k = None
    return greedy
