"""The Llama decoder that every variant shares: blocks, rotary positions, and the loop over layers.

A block's parameters and arithmetic are written here once. What a layer does with each token group is the business of
a *flow* (llama_accel.py, llama_mask.py), which follows the plan:

    shown = flow.show(block, frozen)                 the frozen tokens, or None to a layer that has no use for them
    seen = flow.see(block, shown)                    keys and values of tokens that are no hidden states (accel only)
    hidden = flow.attend(block, hidden, *seen)       attention update, for the tokens the plan gives one
    hidden = hidden + mlp(norm(hidden))              FFN update
    hidden = flow.settle(block, hidden, shown)       what must not have changed is put back (mask only)

Shape legend: N rows of hidden states in a packed flow, B x L in a padded one, H heads, D head_dim.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..kernels.attention import Kernel
from ..kernels.pointwise import MLP, RMSNorm, Rope, rotate
from ..kernels.transfer import to_device
from ..plan.config import TextConfig
from ..plan.layer import LayerPlan
from .cache import ViCACache
from .layout import Tokens


@dataclass(frozen=True)
class Call:
    """What a flow is made from: the wiring, the tokens of this call, and where and how to compute."""

    plan: list[LayerPlan]
    tokens: Tokens
    cache: ViCACache | None
    rotary: "Rotary"
    kernel: Kernel
    device: torch.device

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return to_device(array, self.device)


class Flow(Protocol):
    """How one call's tokens pass through the layers."""

    def start(self, text: torch.Tensor, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the text and visual tokens in reading order, as (hidden, frozen)."""

    def show(self, block: "Block", frozen: torch.Tensor) -> torch.Tensor | None:
        """ZeRO-3 keeps a block's weights until it has the gradients of all that the block was given: nothing more must
        be given than it uses."""

    def see(self, block: "Block", shown: torch.Tensor | None) -> tuple[torch.Tensor, ...]: ...

    def attend(self, block: "Block", hidden: torch.Tensor, *seen: torch.Tensor) -> torch.Tensor: ...

    def settle(self, block: "Block", hidden: torch.Tensor, shown: torch.Tensor | None) -> torch.Tensor: ...

    def text(self, hidden: torch.Tensor) -> torch.Tensor:
        """[number of text tokens, width], in reading order."""


class Rotary:
    """transformers' rotary tables, kept out of the module tree: a `.to(bfloat16)` on the model would round the
    frequencies themselves, and positions would drift."""

    def __init__(self, config: TextConfig):
        self.config, self.embedding = config, None

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Tables for `positions` of any shape."""
        if self.embedding is None:
            self.embedding = LlamaRotaryEmbedding(config=self.config)
        if self.embedding.inv_freq.device != positions.device:
            self.embedding.to(positions.device)
        like = torch.empty(0, dtype=dtype, device=positions.device)
        cos, sin = self.embedding(like, positions.reshape(1, -1))
        return cos.view(*positions.shape, cos.shape[-1]), sin.view(*positions.shape, sin.shape[-1])


def among_ranks() -> bool:
    """Ranks that share weights in pieces (ZeRO-3, FSDP) must all gather the same ones in the same order: in training
    each then calls every module as often as the others do, be it on nothing."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Attention(nn.Module):
    """The four projections. Which rows meet is the flow's choice."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=config.attention_out_bias)

    def queries(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        return rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), rope)

    def keys_values(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), rope)
        return k, self.v_proj(x).unflatten(-1, (-1, self.head_dim))


class Block(nn.Module):
    gradient_checkpointing = False  # transformers switches it on, and puts `_gradient_checkpointing_func` beside it

    def __init__(self, config: TextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, shown: torch.Tensor | None, flow: Flow) -> torch.Tensor:
        # What frozen tokens are to this layer is made outside of the checkpoint: it takes little room, and would
        # otherwise cost as much as the text does, once more.
        seen = flow.see(self, shown)
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.update, hidden, shown, flow, *seen)
        return self.update(hidden, shown, flow, *seen)

    def update(self, hidden: torch.Tensor, shown: torch.Tensor | None, flow: Flow, *seen: torch.Tensor) -> torch.Tensor:
        hidden = flow.attend(self, hidden, *seen)
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return flow.settle(self, hidden, shown)


def run_layers(
    layers, flow: Flow, text: torch.Tensor, visual: torch.Tensor, states: list | None = None
) -> torch.Tensor:
    """Text rows after the last layer, in reading order. `states` collects them before and after each layer."""
    hidden, frozen = flow.start(text, visual)
    for block in layers:
        if states is not None:
            states.append(flow.text(hidden))
        hidden = block(hidden, flow.show(block, frozen), flow)
    return flow.text(hidden)
