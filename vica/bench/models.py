"""Provides the models to measure: a real checkpoint, or random weights of a published shape, in each column's
variant."""

import argparse
from functools import cached_property

import torch
from torch import nn

from ..checkpoint.source import Source
from ..data.processor import ViCAProcessor
from ..engine import Engine
from ..loading import check_device, check_dtype, load_wired
from ..model.llava import ViCAForConditionalGeneration
from ..plan import formats
from ..plan.config import ViCAConfig
from ..plan.vica import PUBLISHED
from ..plan.wiring import Wiring
from ..testing import build_config, build_tokenizer
from ..utils.errors import ViCAError
from .peers import Transformers, fill_tables, share

POSITIONS = 4096
CLIP = "openai/clip-vit-large-patch14-336"
# The name under which layers and prefix rule were published, and the backbone's shape.
SHAPES = {
    "3b": (
        "LLaVA-1.5-3B",
        dict(hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, intermediate_size=6912),
    ),
    "7b": (
        "LLaVA-1.5-7B",
        dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008),
    ),
    "13b": (
        "LLaVA-1.5-13B",
        dict(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824),
    ),
}


def preset_config(name: str) -> ViCAConfig:
    if name == "toy":
        config = build_config()
        config.text_config.max_position_embeddings = POSITIONS
        return config
    recipe, shape = SHAPES[name]
    layers, frozen = PUBLISHED[recipe]
    return ViCAConfig(
        text_config=dict(shape, vocab_size=32000, max_position_embeddings=POSITIONS),
        vision_config=formats.KNOWN_TOWERS[CLIP],
        t2v_layers=layers,
        freeze_prefix=frozen,
    )


def read_config(args: argparse.Namespace, wiring: Wiring) -> ViCAConfig:
    """Returns the model's config as `accel`, without its weights. `wiring` holds the user's settings that replace
    it."""
    if args.model is None:
        return wiring.on(preset_config(args.preset))
    return Source.at(args.model, weights=False).config(wiring)


def random_model(config: ViCAConfig, device, dtype, seed: int = 0) -> ViCAForConditionalGeneration:
    """Returns a model that is filled on the device itself, with weights that preserve the size of activations."""
    with torch.device("meta"):
        model = ViCAForConditionalGeneration(config)
    model = model.to(dtype).to_empty(device=device).eval()
    fill_tables(model, device)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                weight.normal_(0, 1.0 if "embed_tokens" in name else weight[0].numel() ** -0.5)
    return model


class Models:
    """One set of weights under every variant, held in memory once."""

    def __init__(self, model: ViCAForConditionalGeneration, processor: ViCAProcessor | None):
        self.accel, self.processor, self.config = model, processor, model.config
        self.device, self.dtype = model.device, model.dtype
        self._wired = {"accel": model}

    @classmethod
    def of(cls, args: argparse.Namespace, wiring: Wiring) -> "Models":
        device = check_device(args.device)
        dtype = check_dtype(args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
        if args.model is not None:
            return cls(*load_wired(args.model, wiring, device, dtype))
        if not isinstance(dtype, torch.dtype):
            raise ViCAError(f"dtype is {dtype!r}; random weights need float32, float16 or bfloat16")
        config = read_config(args, wiring)
        return cls(random_model(config, device, dtype), ViCAProcessor.from_config(config, build_tokenizer()))

    @cached_property
    def weights(self) -> dict[str, nn.Parameter]:
        return dict(self.accel.named_parameters(remove_duplicate=False))

    def wired(self, variant: str) -> ViCAForConditionalGeneration:
        if variant not in self._wired:
            config = Wiring(variant).only_on(self.config)
            self._wired[variant] = share(ViCAForConditionalGeneration, config, self.weights, self.device)
        return self._wired[variant]

    @cached_property
    def transformers(self) -> Transformers:
        return Transformers(self.config, self.weights, self.device)

    def engine(self, variant: str, **limits) -> Engine:
        return Engine(self.wired(variant), self.processor, **limits)
