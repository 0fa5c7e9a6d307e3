"""Run the decoder's layers over packed rows. What each layer does is data: the plan, as in vica/model."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..kernels.layer_torch import TorchOps
from ..kernels.weights import LayerWeights, fuse_layer
from ..kernels.work import Step
from ..plan.layer import LayerPlan


class Decoder:
    """The fused layers of one model. `pools`: each layer's K/V of text tokens, [layers, S, 2, G, D]."""

    def __init__(
        self, blocks: Iterable[nn.Module], plan: Sequence[LayerPlan], ops: TorchOps, pools: torch.Tensor
    ) -> None:
        self.layers: list[LayerWeights] = [fuse_layer(block) for block in blocks]
        self.plan, self.ops, self.pools = plan, ops, pools
        self.image_layers = [i for i, p in enumerate(plan) if p.reads_frozen]  # layers whose text reads image K/V
        # Each layer's place in an image's K/V; None where text reads no image K/V.
        place = {layer: at for at, layer in enumerate(self.image_layers)}
        self.place_in_image = [place.get(i) for i in range(len(plan))]

    def run(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        """Passes [N, width] through all layers in place, and returns the rows of `step.last`."""
        for i, (layer, plan) in enumerate(zip(self.layers, self.plan)):
            frozen = bool(step.frozen_rows) and not plan.prefix_attends
            qkv = self.ops.norm_linear(hidden, layer.input_norm, layer.qkv, layer.qkv_bias)
            qkv = qkv.unflatten(-1, (-1, self.ops.shape.head_dim))
            q = self.ops.rope_store(qkv, step.positions, step.kv_index, self.pools[i])
            mixed = self.ops.attend(q, self.pools[i], step, frozen, self.place_in_image[i])
            first = step.frozen_rows if frozen else 0
            if i == len(self.layers) - 1 and step.last is not None:  # no later layer reads the other rows
                hidden, mixed, first = hidden[step.last], mixed[step.last - first], 0
            self.ops.add_linear(hidden[first:], mixed, layer.out, layer.out_bias)
            gated = self.ops.norm_gated(hidden, layer.mlp_norm, layer.gate_up, layer.gate_up_bias)
            self.ops.add_linear(hidden, gated, layer.down, layer.down_bias)
        return hidden

    def empty_images(self, sizes: Iterable[int]) -> list[torch.Tensor]:
        """Returns room for the frozen K/V of images of so many tokens, [T2V layers, 2, G, tokens, D] each."""
        shape, make = self.ops.shape, self.pools.new_empty
        return [make(len(self.image_layers), 2, shape.kv_heads, n, shape.head_dim) for n in sizes]

    def fill_images(
        self, rows: torch.Tensor, place: Mapping[str, torch.Tensor], images: Sequence[torch.Tensor]
    ) -> None:
        """Writes the K/V of concatenated features [rows, width] to their images. `place` is what `work.image_places`
        returns, on the device."""
        shape, queries = self.ops.shape, self.ops.shape.heads * self.ops.shape.head_dim
        for at, i in enumerate(self.image_layers):
            layer = self.layers[i]
            bias = None if layer.qkv_bias is None else layer.qkv_bias[queries:]
            kv = self.ops.norm_linear(rows, layer.input_norm, layer.qkv[queries:], bias)
            self.ops.image_store(kv.view(len(rows), 2, shape.kv_heads, shape.head_dim), at, place, images)
