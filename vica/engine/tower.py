"""Run the vision tower and projector at full speed: q, k and v in one product, no layer after the one that is used,
and small batches as CUDA graphs. Towers other than transformers' CLIP and SigLIP run as they are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.activations import ACT2FN

from ..kernels.weights import fuse
from ..vision.towers import ClipTower, SiglipTower
from .graphs import Graphs

CAPTURED_IMAGES = (1, 2, 4, 8)  # numbers of images that are captured; more keep the device busy uncaptured
IMAGES = 64  # most in one pass, which bounds the memory of activations


class Tower:
    """The vision tower and projector of one model."""

    def __init__(self, model: Any, graphs: Graphs) -> None:
        self.tower, self.projector, self.graphs = model.model.vision_tower, model.model.mm_projector, graphs
        self.encode_images = model.model.encode_images  # for towers without a fast form
        inner = self.tower.vision_tower.vision_model
        self.fast = isinstance(inner, (ClipTower, SiglipTower)) and inner.config.attention_dropout == 0
        if self.fast:
            self.inner, self.config = inner, inner.config
            self.layers = inner.encoder.layers[: self.tower.depth]
            self.qkv = [fuse(*(getattr(x.self_attn, f"{n}_proj") for n in "qkv")) for x in self.layers]
            self._choose_steps(inner.config.hidden_act)
        self.pixels: dict[int, torch.Tensor] = {}  # inputs of captured passes, by number of images

    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Returns the features of each image of [n, 3, H, W], [tokens, width]."""
        # Copies: the next captured pass overwrites its results, and a view would keep a whole batch alive.
        return [x.clone() for some in pixels.split(IMAGES) for x in self._encode(some)]

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        size = next((n for n in CAPTURED_IMAGES if n >= len(pixels)), None)
        if size is None or not self.fast or not self.graphs.enabled:
            return self._features(pixels)
        if size not in self.pixels:
            self.pixels[size] = pixels.new_zeros(size, *pixels.shape[1:])
        static = self.pixels[size]
        static[: len(pixels)] = pixels
        arrays = dict(images=np.zeros(1))  # a stand-in: the input is the pixels, which lie in place already
        features: torch.Tensor = self.graphs.run(
            ("tower", size), arrays, dict(images=1), lambda _: self._features(static)
        )
        return features[: len(pixels)]

    def _choose_steps(self, activation: str) -> None:
        """Takes Triton's steps on CUDA, where there are any."""
        self.add_norm: Callable[[torch.Tensor, torch.Tensor, nn.LayerNorm], torch.Tensor] = add_norm
        self.act: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[activation]
        if self.graphs.device.type == "cuda":
            from ..kernels import tower_triton

            self.add_norm = tower_triton.add_norm
            self.act = tower_triton.quick_gelu if activation == "quick_gelu" else self.act

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor
        if not self.fast:
            features = self.encode_images(pixels)
            return features
        hidden = self.inner.embeddings(pixels.to(self.layers[0].mlp.fc1.weight.dtype))
        if isinstance(self.inner, ClipTower):
            hidden = self.inner.pre_layrnorm(hidden)
        hidden = hidden.contiguous()
        normed = self.layers[0].layer_norm1(hidden)
        for layer, after, qkv in zip(self.layers, [*self.layers[1:], None], self.qkv):
            normed = self.add_norm(hidden, self._attention(layer, normed, *qkv), layer.layer_norm2)
            update = layer.mlp.fc2(self.act(layer.mlp.fc1(normed)))
            if after is not None:
                normed = self.add_norm(hidden, update, after.layer_norm1)
        features = self.projector((hidden + update)[:, self.tower.skip :])
        return features

    def _attention(self, layer: Any, x: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        q, k, v = F.linear(x, qkv, bias).unflatten(-1, (3, self.config.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(BACKENDS, set_priority=True):
            mixed = F.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = layer.self_attn.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


def add_norm(hidden: torch.Tensor, update: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """Adds `update` to `hidden` in place and returns the layer norm of the sum."""
    hidden += update
    normed: torch.Tensor = norm(hidden)
    return normed


# cuDNN is the fastest where all images have the same length, because it plans once.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
