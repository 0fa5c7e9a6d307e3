"""Vision towers: transformers' CLIP and SigLIP, or any vision transformer of open_clip by name.

Weights are named as LLaVA names them, `vision_tower.vision_tower.vision_model.*`, not as transformers does.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, CLIPVisionModel, PreTrainedConfig, PreTrainedModel, SiglipVisionModel

from ..plan.formats import CLASS_TOKENS
from ..utils.errors import ViCAError


# Own subclasses, because transformers renames the weights of its own towers when they are nested in a model.
class ClipTower(CLIPVisionModel):
    def hidden_state(self, pixels: torch.Tensor, depth: int) -> torch.Tensor:
        """Returns the sequence after `depth` encoder layers; later layers do not run."""
        hidden = self.pre_layrnorm(self.embeddings(pixels))
        return run_encoder(self.encoder, hidden, depth)


class SiglipTower(SiglipVisionModel):
    def hidden_state(self, pixels: torch.Tensor, depth: int) -> torch.Tensor:
        return run_encoder(self.encoder, self.embeddings(pixels), depth)


def run_encoder(encoder: Any, hidden: torch.Tensor, depth: int) -> torch.Tensor:
    for layer in encoder.layers[:depth]:
        hidden = layer(hidden, None)
    return hidden


class OpenClipConfig(PreTrainedConfig):
    """Names an open_clip model. `hidden_size` and the other figures are the tower's own; the config holds them so that
    a checkpoint can be described without building the tower."""

    model_type = "open_clip_vision"
    base_config_key = "vision_config"

    name: str = ""
    hidden_size: int = 0
    num_hidden_layers: int = 0
    image_size: int = 224
    patch_size: int = 16
    image_mean: list | tuple = (0.48145466, 0.4578275, 0.40821073)
    image_std: list | tuple = (0.26862954, 0.26130258, 0.27577711)


AutoConfig.register(OpenClipConfig.model_type, OpenClipConfig)


class OpenClipTower(PreTrainedModel):
    config_class = OpenClipConfig
    visual: Any  # open_clip's
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: OpenClipConfig):
        super().__init__(config)
        self.visual = open_clip_visual(config.name)
        if (count := count_blocks(self.visual)) != config.num_hidden_layers:
            raise ViCAError(
                f"vision_config says num_hidden_layers={config.num_hidden_layers}; "
                f"open_clip's {config.name} has {count} transformer blocks"
            )
        self.tables = {name: table.clone() for name, table in self.named_non_persistent_buffers()}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keeps open_clip's own weights, and refills the position tables: no checkpoint holds them, and transformers
        empties them while it loads."""
        for name, table in self.tables.items():
            self.get_buffer(name).copy_(table)

    def hidden_state(self, pixels: torch.Tensor, depth: int) -> torch.Tensor:
        """Returns the patch tokens after `depth` blocks; open_clip strips the class token itself."""
        out = self.visual.forward_intermediates(
            pixels, indices=[depth - 1], stop_early=True, normalize_intermediates=False, output_fmt="NLC",
            intermediates_only=True,
        )  # fmt: skip
        return out["image_intermediates"][0]


def count_blocks(visual: Any) -> int:
    """Returns the number of blocks. open_clip's own transformers and timm's, which it wraps, keep them in different
    places."""
    if hasattr(visual, "trunk"):
        return len(getattr(visual.trunk, "blocks", ()))
    return len(visual.transformer.resblocks) if hasattr(visual, "transformer") else 0


# A tiny text tower in place of the unused real one: some are large, and some are fetched from the hub.
NO_TEXT = dict(width=8, heads=1, layers=1, vocab_size=8, context_length=8)


def open_clip_visual(name: str) -> nn.Module:
    try:
        import open_clip
    except ImportError as error:
        raise ViCAError(f"the tower {name!r} needs open_clip: pip install 'vica[open_clip]'") from error
    if name not in open_clip.list_models():
        raise ViCAError(f"open_clip knows no model {name!r}; open_clip.list_models() lists them")
    with torch.device("cpu"):  # some towers compute tables when they are built, which fails on the meta device
        return open_clip.create_model(name, pretrained=None, pretrained_text=False, text_cfg=NO_TEXT).visual


TOWERS = {"clip_vision_model": ClipTower, "siglip_vision_model": SiglipTower, OpenClipConfig.model_type: OpenClipTower}


class NamedTower(nn.Module):
    """Gives the tower its name in checkpoints, `vision_tower.vision_model`."""

    vision_model: ClipTower | SiglipTower | OpenClipTower


class VisionTower(nn.Module):
    """Returns patch features of images, from the layer that the language model was trained with."""

    def __init__(self, config: PreTrainedConfig, select_layer: int = -2, select_feature: str = "patch"):
        super().__init__()
        if config.model_type not in TOWERS:
            raise ViCAError(f"vision_config has model_type {config.model_type!r}; known: {', '.join(TOWERS)}")
        if select_feature == "cls_patch" and config.model_type == OpenClipConfig.model_type:
            raise ViCAError("mm_vision_select_feature is 'cls_patch'; of open_clip towers only 'patch' is supported")
        # hidden state i is the sequence after i layers: -1 is the last of num_hidden_layers + 1
        self.depth = select_layer if select_layer >= 0 else config.num_hidden_layers + 1 + select_layer
        if not 0 < self.depth <= config.num_hidden_layers:
            raise ViCAError(
                f"mm_vision_select_layer is {select_layer}; the tower has {config.num_hidden_layers} layers"
            )
        self.skip = CLASS_TOKENS.get(config.model_type, 0) if select_feature == "patch" else 0
        self.vision_tower = NamedTower()
        self.vision_tower.vision_model = TOWERS[config.model_type](config)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Maps [N, 3, H, W] to [N, patches, features]."""
        tower = self.vision_tower.vision_model
        expected = (3, tower.config.image_size, tower.config.image_size)
        if tuple(pixels.shape[1:]) != expected:
            raise ViCAError(
                f"pixel_values are {list(pixels.shape)}; this tower takes [N, {', '.join(map(str, expected))}]"
            )
        dtype = next(tower.parameters()).dtype
        return tower.hidden_state(pixels.to(dtype), self.depth)[:, self.skip :]
