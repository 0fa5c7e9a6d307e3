"""`vica.load`: a model and its processor from a folder or a hub repository, in any of the three formats."""

import copy
import logging
import os
import re
from functools import partial
from pathlib import Path

import torch
from transformers import LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from .checkpoint import adapters, files
from .checkpoint.convert import convert as rewrite
from .checkpoint.folder import SHARD_SIZE
from .checkpoint.source import Source
from .data.processor import ViCAProcessor
from .data.tokenizer import add_image_token, load_tokenizer
from .model.llava import ViCAForConditionalGeneration
from .plan import formats
from .plan.config import ViCAConfig
from .plan.wiring import Wiring
from .utils.errors import ViCAError
from .utils.files import read_json

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load(
    path_or_repo: str | os.PathLike,
    variant: str | None = None,
    t2v_layers=None,
    device=None,
    dtype=None,
    freeze_prefix: bool | int | None = None,
    recipe: str | os.PathLike | None = None,
    **kwargs,
) -> tuple[ViCAForConditionalGeneration, ViCAProcessor | None]:
    """Returns a checkpoint's model and processor, or None for the processor where the folder has no tokenizer.

    Settings that are not given come from `recipe` (a file of configs/), the environment (T2V_LAYERS) or the checkpoint:
    the first that names them. `device` is CUDA by default where there is one; `dtype` is the checkpoint's.
    """
    return load_wired(path_or_repo, Wiring(variant, t2v_layers, freeze_prefix, recipe), device, dtype, **kwargs)


def load_wired(
    path_or_repo: str | os.PathLike, wiring: Wiring, device=None, dtype=None, **kwargs
) -> tuple[ViCAForConditionalGeneration, ViCAProcessor | None]:
    """Does the work of `load` for settings that are one value already."""
    dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
    device, dtype = check_device(device), check_dtype(dtype)
    source = Source.at(path_or_repo, **files.pop_hub_arguments(kwargs))
    model, _ = ViCAForConditionalGeneration.from_source(source, wiring, dtype=dtype, **kwargs)
    return model.to(device).eval(), load_processor(source.folder, model.config)


def check_device(given: str | torch.device | None) -> torch.device:
    """Returns the device; by default CUDA where there is one."""
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(given)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ViCAError(f"device is {str(given)!r}; give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ViCAError(
            f"device is {str(device)!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """Returns the dtype, or "auto" for the checkpoint's."""
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ViCAError(f"dtype is {dtype!r}; it must be auto, {', '.join(known)}")
    return known[dtype]


def load_processor(folder: Path, config: ViCAConfig) -> ViCAProcessor | None:
    """Returns the saved processor, or, for folders of other code bases, one made from the config and the tokenizer."""
    try:
        return _load_processor(folder, config)
    except ViCAError:
        raise
    except Exception as error:  # whatever a broken file makes transformers and its tokenizers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ViCAError(f"the tokenizer or processor in {folder} cannot be read: {reason}") from error


def _load_processor(folder: Path, config: ViCAConfig) -> ViCAProcessor | None:
    saved = folder / "processor_config.json"
    if saved.is_file() and read_json(saved).get("processor_class") == ViCAProcessor.__name__:
        return ViCAProcessor.from_pretrained(folder)
    if not holds_tokenizer(folder):
        log.warning("%s holds no tokenizer: the model comes without a processor", folder)
        return None
    processor = ViCAProcessor.from_config(config, load_tokenizer(folder))
    if (settings := saved_image_settings(folder)) is not None and processor.image_processor is not None:
        padded = settings.pop("do_pad", None)
        mode = processor.image_mode if padded is None else "pad" if padded else "crop"
        processor = ViCAProcessor(
            settings, processor.tokenizer, processor.conversation, mode, processor.image_token_index
        )
    return processor


def convert(source, target, to: str, base=None, shard_size: str = SHARD_SIZE, **settings) -> Path:
    """Rewrites a checkpoint as `to` ("llava", "hf" or "vica"), its tokenizer and processor with it, and returns the new
    folder. Adapters are merged into their base: `base`, or the one that they name. `settings` are Wiring's."""
    if to not in formats.FORMATS:
        raise ViCAError(f"--to is {to!r}; it must be one of {', '.join(formats.FORMATS)}")
    if not re.fullmatch(r"[1-9]\d*[KMG]B", shard_size):
        raise ViCAError(f"the largest size of a file is {shard_size!r}; give a number with KB, MB or GB")
    hub = files.pop_hub_arguments(settings)
    source = Source.at(source, **hub)
    config = source.config(Wiring(**settings))
    config.architectures = [ViCAForConditionalGeneration.__name__]
    origin, read = source, partial(source.weights, ViCAForConditionalGeneration, config)
    if source.kind == "adapters":
        origin = Source.at(base or adapters.base_of(source.folder), **hub)
        read = partial(adapters.merged_weights, ViCAForConditionalGeneration, source.folder, origin, config)
    elif base is not None:
        raise ViCAError(f"--base is {str(base)!r}, but {source.folder} holds no adapters to merge into it")
    saved = load_processor(source.folder if holds_tokenizer(source.folder) else origin.folder, config)
    processor: ViCAProcessor | LlavaProcessor | None = saved
    image_token = None
    if to == "hf" and saved is not None and config.vision_config is not None:
        processor = theirs = hf_processor(saved, config)
        image_token = theirs.image_token_id
    return rewrite(read, origin.folder, target, to, config, processor, image_token, shard_size)


def holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def hf_processor(processor: ViCAProcessor, config: ViCAConfig) -> LlavaProcessor:
    """Returns transformers' processor for the same tokens and pixels. The model has a tower."""
    assert config.vision_config is not None
    tokenizer = copy.deepcopy(processor.tokenizer)
    add_image_token(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    images, vision = processor.image_processor, config.vision_config
    if processor.image_mode == "pad":
        settings = {k: v for k, v in images.to_dict().items() if k != "image_processor_type"}
        images = LlavaImageProcessorPil(**settings, do_pad=True)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default" if formats.drops_class_token(config) else "full",
        num_additional_image_tokens=formats.CLASS_TOKENS.get(vision.model_type, 0),
    )


def saved_image_settings(folder: Path) -> dict | None:
    """Returns the image processor's settings that transformers saved, from either of its files."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            saved = read_json(folder / name)
            if settings := saved.get("image_processor", saved if "image_processor_type" in saved else None):
                return dict(settings)
    return None
