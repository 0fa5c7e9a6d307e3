"""Fuse the decoder's weights as the engine multiplies by them: q, k and v in one matrix, gate and up in another.

The model's own parameters become views of the fused ones, so memory holds nothing twice and the model stays usable.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..utils.errors import ViCAError


@dataclass
class LayerWeights:
    """One decoder layer's weights. Those that are not fused are the model's own tensors."""

    input_norm: torch.Tensor
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * head_dim, width]
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor  # [2 * intermediate, width]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None

    def kv_weights(self) -> list[torch.Tensor]:
        """Returns the weights that decide a frozen token's keys and values."""
        return [self.input_norm, self.qkv, *([] if self.qkv_bias is None else [self.qkv_bias])]


def fuse_layer(block: Any) -> LayerWeights:
    """Returns the weights of a Llama-like decoder block, fused in place."""
    attention, mlp = block.self_attn, block.mlp
    qkv, qkv_bias = fuse(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = fuse(mlp.gate_proj, mlp.up_proj)
    for linear in (attention.o_proj, mlp.down_proj):
        check_plain(linear)
    return LayerWeights(
        block.input_layernorm.weight.data,
        qkv,
        qkv_bias,
        attention.o_proj.weight.data,
        bias_of(attention.o_proj),
        block.post_attention_layernorm.weight.data,
        gate_up,
        gate_up_bias,
        mlp.down_proj.weight.data,
        bias_of(mlp.down_proj),
    )


def fuse(*linears: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns one weight and bias for several linear layers on the same input, and makes the layers' own parameters
    views of them. Layers that are fused already stay as they are."""
    for linear in linears:
        check_plain(linear)
    weight = _fuse_parameters([linear.weight for linear in linears])
    if linears[0].bias is None:
        return weight, None
    return weight, _fuse_parameters([linear.bias for linear in linears])


def _fuse_parameters(parts: list[torch.Tensor]) -> torch.Tensor:
    if (whole := _already_fused(parts)) is not None:
        return whole
    whole = torch.cat([part.data for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts])):
        part.data = view
    return whole


def _already_fused(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Returns the fused parameter if the parts lie side by side in one storage, as a second engine on the same model
    finds them."""
    first, rows = parts[0].data, sum(len(part) for part in parts)
    at = first.data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.data_ptr() != at or not part.is_contiguous():
            return None
        at += part.numel() * part.element_size()
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def check_plain(linear: nn.Module) -> None:
    """Raises ViCAError for adapters and quantised layers, which compute something else than their weight says."""
    if type(linear) is not nn.Linear:
        raise ViCAError(
            f"the engine needs plain linear layers, this model has {type(linear).__name__}: merge adapters into the "
            "weights (merge_and_unload), and load without quantisation"
        )


def bias_of(linear: nn.Linear) -> torch.Tensor | None:
    """Returns the bias without its gradient, or None."""
    return None if linear.bias is None else linear.bias.data
