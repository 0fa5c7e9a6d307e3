"""The decoder's layers over packed rows, following the plan: what each layer does is data, as in vica/model."""

import torch

from ..kernels.layer_torch import TorchOps
from ..kernels.weights import LayerWeights, fuse_layer
from ..kernels.work import Step
from ..plan.layer import LayerPlan


class Decoder:
    """`pools`: each layer's K/V of text rows, [S, 2, G, D]."""

    def __init__(self, blocks, plan: list[LayerPlan], ops: TorchOps, pools: torch.Tensor):
        self.layers: list[LayerWeights] = [fuse_layer(block) for block in blocks]
        self.plan, self.ops, self.pools = plan, ops, pools
        # where each layer's K/V lie in an image's, None where text sees no image K/V
        seeing = [i for i, p in enumerate(plan) if p.reads_frozen]
        self.image_layers = seeing
        self.image_layer_of = [seeing.index(i) if i in seeing else None for i in range(len(plan))]

    def run(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        """[N, width] through all layers, in place; the rows of `step.last`."""
        for i, (layer, plan) in enumerate(zip(self.layers, self.plan)):
            frozen = bool(step.frozen_rows) and not plan.prefix_attends
            qkv = self.ops.norm_linear(hidden, layer.input_norm, layer.qkv, layer.qkv_bias)
            qkv = qkv.unflatten(-1, (-1, self.ops.shape.head_dim))
            q = self.ops.rope_store(qkv, step.pos, step.slot, self.pools[i])
            mixed = self.ops.attend(q, self.pools[i], step, frozen, self.image_layer_of[i])
            first = step.frozen_rows if frozen else 0
            if i == len(self.layers) - 1 and step.last is not None:  # nobody reads the other rows any more
                hidden, mixed, first = hidden[step.last], mixed[step.last - first], 0
            self.ops.add_linear(hidden[first:], mixed, layer.out, layer.out_bias)
            gated = self.ops.norm_gated(hidden, layer.mlp_norm, layer.gate_up, layer.gate_up_bias)
            self.ops.add_linear(hidden, gated, layer.down, layer.down_bias)
        return hidden

    def empty_images(self, sizes: list[int]) -> list[torch.Tensor]:
        """Room for images' frozen K/V, [T2V layers, 2, G, tokens, D] each."""
        shape, make = self.ops.shape, self.pools.new_empty
        return [make(len(self.image_layers), 2, shape.kv_heads, n, shape.head_dim) for n in sizes]

    def fill_images(self, rows: torch.Tensor, place: dict, images: list[torch.Tensor]) -> None:
        """The K/V of concatenated features, [rows, width], to their images; `place` says which and where."""
        shape, queries = self.ops.shape, self.ops.shape.heads * self.ops.shape.head_dim
        for t, i in enumerate(self.image_layers):
            layer = self.layers[i]
            bias = None if layer.qkv_bias is None else layer.qkv_bias[queries:]
            kv = self.ops.norm_linear(rows, layer.input_norm, layer.qkv[queries:], bias)
            self.ops.image_store(kv.view(len(rows), 2, shape.kv_heads, shape.head_dim), t, place, images)
