"""The Llama backbone (Mistral and Qwen2 have its shape): rotary positions, projections, and the decoder block.

A block owns the weights and their arithmetic. Which tokens meet them in a layer is the flow's choice (call.py).

Shape legend: N tokens of a packed flow, B x L of a padded one, H heads, D head_dim.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..kernels.pointwise import MLP, RMSNorm, Rope, rotate
from ..plan.config import TextConfig
from .call import Flow, Run, plain_run


class Rotary:
    """transformers' rotary tables, kept out of the module tree: a `.to(bfloat16)` on the model would round the
    frequencies themselves, and positions would drift."""

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.embedding: LlamaRotaryEmbedding | None = None

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Returns the tables for `positions` of any shape."""
        if self.embedding is None:
            self.embedding = LlamaRotaryEmbedding(config=self.config)
        if self.embedding.inv_freq.device != positions.device:
            self.embedding.to(positions.device)
        like = torch.empty(0, dtype=dtype, device=positions.device)
        cos, sin = self.embedding(like, positions.reshape(1, -1))
        return cos.view(*positions.shape, cos.shape[-1]), sin.view(*positions.shape, sin.shape[-1])


class Attention(nn.Module):
    """The four projections."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=bool(config.attention_out_bias))

    def queries(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        return rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), rope)

    def keys(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        return rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), rope)

    def keys_values(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys(x, rope), self.v_proj(x).unflatten(-1, (-1, self.head_dim))


class Block(nn.Module):
    gradient_checkpointing = False  # transformers switches it on, and puts `_gradient_checkpointing_func` beside it

    def __init__(self, config: TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, visual: torch.Tensor | None, place: Any, flow: Flow
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        run: Run = plain_run
        if self.gradient_checkpointing and self.training:
            run = cast(Run, self._gradient_checkpointing_func)
        return flow.layer(self, x, visual, place, run)

    def feed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns `hidden` with its FFN update."""
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
