"""Compute what a block does between its matrix products: norm, rotary, gate.

On CUDA each is one pass over the data, forward and backward, and rounds no more often than the plain form.
"""

import torch
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

Rope = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [..., D]


class RMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and x.numel():
            from .pointwise_triton import rms_norm

            return rms_norm(x, self.weight, self.variance_epsilon)
        normed: torch.Tensor = super().forward(x)
        return normed


class MLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.is_cuda and gate.numel() and self.config.hidden_act == "silu":
            from .pointwise_triton import silu_gate

            gated = silu_gate(gate, up)
        else:
            gated = self.act_fn(gate) * up
        out: torch.Tensor = self.down_proj(gated)
        return out


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Returns x [..., H, D] rotated, in its own type: under autocast the tables are wider, and q and k must match v."""
    if x.is_cuda and x.numel():
        from .pointwise_triton import rotate_pairs

        return rotate_pairs(x, *rope)
    cos, sin = (t.unsqueeze(-2) for t in rope)
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)
