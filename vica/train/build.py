"""Builds the model and processor that training starts from."""

from pathlib import Path

import torch
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from ..checkpoint.projector import read_projector
from ..checkpoint.source import Source, check_weights
from ..checkpoint.tower import with_tower
from ..data.conversation import get_template
from ..data.processor import ViCAProcessor
from ..loading import load_processor
from ..model.llava import ViCAForConditionalGeneration
from ..plan.config import ViCAConfig
from ..plan.wiring import Wiring
from ..utils.errors import ViCAError
from ..vision.projectors import build_projector

PROJECTOR = "model.mm_projector."
# Settings of the vision side for a model that starts from a plain language model.
SEEING = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}


def build(model_args, data_args, train_args) -> tuple[ViCAForConditionalGeneration, ViCAProcessor]:
    source = Source.at(model_args.model_name_or_path, cache_dir=train_args.cache_dir)
    fresh = source.kind == "language model"
    config = new_config(source.raw, model_args) if fresh else known_config(source.raw, model_args)
    config = Wiring.of_flags(model_args).on(with_tower(config, source.cache_dir))
    config.conversation = get_template(model_args.version).name
    config.image_aspect_ratio = data_args.image_aspect_ratio
    config.text_config.use_cache = True
    if config.vision_config is None:
        raise ViCAError(f"{source.folder} has no vision tower and --vision_tower names none")

    set_seed(train_args.seed)  # for a new projector and for adapters
    weights = source.tensors(config)
    if model_args.pretrain_mm_mlp_adapter:
        weights = {name: x for name, x in weights.items() if not name.startswith(PROJECTOR)}
        weights |= read_projector(model_args.pretrain_mm_mlp_adapter)
    elif fresh:
        weights |= new_projector(config)
    check_weights(ViCAForConditionalGeneration, config, weights, source.folder)
    model = ViCAForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=loading_dtype(train_args), **quantisation(train_args)
    )
    model.config.name_or_path = model.name_or_path = str(model_args.model_name_or_path)  # peft reads the latter
    present = {type(module).__name__ for module in model.modules()}
    # FSDP refuses names that no module has
    model._no_split_modules = sorted(present.intersection(model._no_split_modules))
    gather_by_block(model)
    return model, read_processor(source.folder, config)


def new_config(raw: dict, args) -> ViCAConfig:
    return ViCAConfig(
        text_config=raw,
        mm_vision_tower=args.vision_tower,
        **{name: default if getattr(args, name) is None else getattr(args, name) for name, default in SEEING.items()},
    )


def known_config(raw: dict, args) -> ViCAConfig:
    config = ViCAConfig.from_dict(raw)
    for name in SEEING:
        given, trained = getattr(args, name), getattr(config, name)
        if given not in (None, trained):
            raise ViCAError(f"--{name} is {given!r}, but {args.model_name_or_path} was trained with {trained!r}")
    return config


def new_projector(config: ViCAConfig) -> dict[str, torch.Tensor]:
    projector = build_projector(config.mm_projector_type, config.mm_hidden_size, config.text_config.hidden_size)
    return {PROJECTOR + name: tensor for name, tensor in projector.state_dict().items()}


def read_processor(folder: Path, config: ViCAConfig) -> ViCAProcessor:
    """Returns a processor with the folder's tokens and pixels, but with this run's template and image mode: the trained
    model is used with these."""
    saved = load_processor(folder, config)
    if saved is None:
        raise ViCAError(f"{folder} holds no tokenizer")
    processor = ViCAProcessor.from_config(config, saved.tokenizer)
    processor.image_processor = saved.image_processor
    return processor


def gather_by_block(model) -> None:
    """Makes ZeRO-3 fetch a block's weights at once. Hooks on each module of a block cost the host more time than the
    device needs for the layer."""
    if is_deepspeed_zero3_enabled():
        from deepspeed.utils import set_z3_leaf_modules

        blocks = {type(module) for module in model.modules() if type(module).__name__ in model._no_split_modules}
        set_z3_leaf_modules(model, list(blocks))


def loading_dtype(args) -> torch.dtype:
    """Returns half precision, which frozen weights keep. `widen` widens the learning ones later, unless DeepSpeed keeps
    its own wide copy. FSDP needs one type for all."""
    if args.fsdp:
        return torch.float32
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def widen(model, args) -> None:
    """Keeps learning weights in float32: steps of a small learning rate are lost in half precision."""
    if args.deepspeed_plugin is None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def quantisation(args) -> dict:
    if args.bits == 16:
        return {}
    if is_deepspeed_zero3_enabled():
        raise ViCAError(f"--bits {args.bits} does not go with ZeRO-3, which shards plain weights only")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ViCAError(f"--bits {args.bits} needs bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=args.bits == 4,
        load_in_8bit=args.bits == 8,
        llm_int8_skip_modules=["mm_projector", "vision_tower", "lm_head"],
        bnb_4bit_compute_dtype=loading_dtype(args),
        bnb_4bit_use_double_quant=args.double_quant,
        bnb_4bit_quant_type=args.quant_type,
    )
    return {"quantization_config": config, "device_map": {"": args.device}}
