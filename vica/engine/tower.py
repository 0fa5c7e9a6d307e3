"""The vision tower and projector at full speed: q, k and v in one product, no layer after the one that is used, and
small batches as CUDA graphs. Towers other than transformers' CLIP and SigLIP run as they are."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.activations import ACT2FN

from ..kernels.weights import fuse
from ..vision.towers import ClipTower, SiglipTower
from .graphs import Graphs

CAPTURED_IMAGES = (1, 2, 4, 8)  # numbers of images that are captured; more keep the device busy as they are
IMAGES = 64  # at once, which bounds the memory of activations


class Tower:
    def __init__(self, model, graphs: Graphs):
        self.tower, self.projector, self.graphs = model.model.vision_tower, model.model.mm_projector, graphs
        self.whole = model.model.encode_images
        inner = self.tower.vision_tower.vision_model
        self.fast = isinstance(inner, (ClipTower, SiglipTower)) and inner.config.attention_dropout == 0
        if self.fast:
            self.inner, self.config = inner, inner.config
            self.layers = inner.encoder.layers[: self.tower.depth]
            self.qkv = [fuse(*(getattr(x.self_attn, f"{n}_proj") for n in "qkv")) for x in self.layers]
            self._choose_steps(inner.config.hidden_act)
        self.pixels: dict[int, torch.Tensor] = {}

    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """[n, 3, H, W] to the features of each, [tokens, width]."""
        return [x.clone() for some in pixels.split(IMAGES) for x in self._encode(some)]

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        size = next((n for n in CAPTURED_IMAGES if n >= len(pixels)), None)
        if size is None or not self.fast or not self.graphs.enabled:
            return self._features(pixels)
        if size not in self.pixels:
            self.pixels[size] = pixels.new_zeros(size, *pixels.shape[1:])
        static = self.pixels[size]
        static[: len(pixels)] = pixels
        arrays = dict(images=np.zeros(1))  # the pixels are the input; they lie in place already
        return self.graphs.run(("tower", size), arrays, dict(images=1), lambda _: self._features(static))[: len(pixels)]

    def _choose_steps(self, activation: str) -> None:
        self.add_norm, self.act = add_norm, ACT2FN[activation]
        if self.graphs.device.type == "cuda":
            from ..kernels import tower_triton

            self.add_norm = tower_triton.add_norm
            self.act = tower_triton.quick_gelu if activation == "quick_gelu" else self.act

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        if not self.fast:
            return self.whole(pixels)
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
        return self.projector((hidden + update)[:, self.tower.skip :])

    def _attention(self, layer, x: torch.Tensor, qkv, bias) -> torch.Tensor:
        q, k, v = F.linear(x, qkv, bias).unflatten(-1, (3, self.config.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(BACKENDS, set_priority=True):
            mixed = F.scaled_dot_product_attention(q, k, v)
        return layer.self_attn.out_proj(mixed.transpose(1, 2).flatten(2))


def add_norm(hidden: torch.Tensor, update: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """hidden += update; the layer norm of it."""
    hidden += update
    return norm(hidden)


# cuDNN's is the fastest where every image has the same length; it plans once.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
