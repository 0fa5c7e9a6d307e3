"""`vica.load`: a model and its processor from a folder or a hub repository, in any of the three layouts."""

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
from .checkpoint.folder import LAYOUTS
from .data.processor import ViCAProcessor
from .data.tokenizer import add_image_token, load_tokenizer
from .model.llava import ViCAForConditionalGeneration
from .plan import formats
from .plan.config import ViCAConfig
from .utils.errors import ViCAError

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
    """Layers: `t2v_layers`, then `recipe` (a file of configs/), then T2V_LAYERS, then the checkpoint.
    `device` is CUDA where there is one; `dtype` is the checkpoint's. The processor is None where no tokenizer lies."""
    dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
    device, dtype = check_device(device), check_dtype(dtype)
    hub = files.pop_hub_arguments(kwargs)
    folder = files.find_folder(path_or_repo, **hub)
    model = ViCAForConditionalGeneration.from_pretrained(
        folder,
        cache_dir=hub.get("cache_dir"),  # a tower of the hub's may lie there too
        variant=variant,
        t2v_layers=t2v_layers,
        freeze_prefix=freeze_prefix,
        recipe=recipe,
        dtype=dtype,
        **kwargs,
    )
    model.config.name_or_path = str(path_or_repo)
    return model.to(device).eval(), load_processor(folder, model.config)


def check_device(given: str | torch.device | None) -> torch.device:
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
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ViCAError(f"dtype is {dtype!r}; it must be auto, {', '.join(known)}")
    return known[dtype]


def load_processor(folder: Path, config: ViCAConfig) -> ViCAProcessor | None:
    """The saved processor; for folders of other code bases, one made from the config and the tokenizer."""
    try:
        return _load_processor(folder, config)
    except ViCAError:
        raise
    except Exception as error:  # whatever a broken file makes transformers and its tokenizers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ViCAError(f"the tokenizer or processor in {folder} cannot be read: {reason}") from error


def _load_processor(folder: Path, config: ViCAConfig) -> ViCAProcessor | None:
    saved = folder / "processor_config.json"
    if saved.is_file() and files.read_json(saved).get("processor_class") == ViCAProcessor.__name__:
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


def convert(source, target, to: str, base=None, shard_size: str = files.SHARD_SIZE, **settings) -> Path:
    """Rewrites a checkpoint as `to` ("llava", "hf" or "vica"), its tokenizer and processor with it. Adapters are merged
    into their base: `base`, or the one that they name."""
    if to not in LAYOUTS:
        raise ViCAError(f"--to is {to!r}; it must be one of {', '.join(LAYOUTS)}")
    if not re.fullmatch(r"[1-9]\d*[KMG]B", shard_size):
        raise ViCAError(f"the largest size of a file is {shard_size!r}; give a number with KB, MB or GB")
    folder = files.find_folder(source)
    config = files.read_config(folder, **settings)
    config.architectures = [ViCAForConditionalGeneration.__name__]
    origin, read = folder, partial(files.read_checkpoint, ViCAForConditionalGeneration, folder, config)
    if files.holds_adapters(folder):
        origin = files.find_folder(base or adapters.base_of(folder))
        read = partial(adapters.merged_weights, ViCAForConditionalGeneration, folder, origin, config)
    elif base is not None:
        raise ViCAError(f"--base is {str(base)!r}, but {folder} holds no adapters to merge into it")
    processor, image_token = load_processor(folder if holds_tokenizer(folder) else origin, config), None
    if to == "hf" and processor is not None and config.vision_config is not None:
        processor = hf_processor(processor, config)
        image_token = processor.image_token_id
    return rewrite(read, origin, target, to, config, processor, image_token, shard_size)


def holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def hf_processor(processor: ViCAProcessor, config: ViCAConfig) -> LlavaProcessor:
    """transformers' processor for the same tokens and pixels."""
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
    """What transformers saved of an image processor, in either of its files."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            saved = files.read_json(folder / name)
            if settings := saved.get("image_processor", saved if "image_processor_type" in saved else None):
                return dict(settings)
    return None
