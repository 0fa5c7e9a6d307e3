"""mask: the slow, obvious variant and the referee of accel.

Every token of the expanded row is a hidden state in every layer; an explicit [B, 1, queries, keys] mask says who sees
whom, and rows that the plan freezes are put back after each layer. The rule, once more in words:

    a text query sees a key that is no padding, stands no later than itself, and is text, or visual in a T2V layer
"""

import numpy as np
import torch

from ..kernels.attention import eager_heads, sdpa_heads
from .backbone_llama import Block, Call
from .cache import Book
from .layout import pad_index


def visible(q_pos, k_pos, k_visual, sees_visual: bool) -> np.ndarray:
    """[B, queries, keys] from positions [B, queries], [B, keys] (negative: padding) and visual flags [B, keys]."""
    causal = (k_pos[:, None] >= 0) & (k_pos[:, None] <= q_pos[:, :, None])
    return causal & (sees_visual | ~k_visual[:, None])


class MaskFlow:
    def __init__(self, call: Call):
        self.call, self.tokens = call, call.tokens
        tokens, cache = call.tokens, call.cache
        self.heads = eager_heads if call.kernel.is_eager else sdpa_heads
        self.index = pad_index(tokens.row, tokens.batch)
        self.padding = self.index < 0
        at = np.where(self.padding, 0, self.index)
        self.pos = np.where(self.padding, -1, tokens.pos[at])
        self.visual = self.call.tensor(tokens.visual[at] & ~self.padding)[..., None]
        self.prefix = self.call.tensor(tokens.prefix[at] & ~self.padding)[..., None]
        book = cache.book("all") if cache is not None else Book.empty(tokens.batch)
        if cache is not None:
            cache.layer_books = ["all"] * len(call.plan)
        book.append(tokens, np.ones(len(tokens), bool))
        self.k_pos, self.k_visual = book.pos, book.visual
        self.masks = {sees: self._mask(sees) for sees in {p.reads for p in call.plan}}

    def _mask(self, sees_visual: bool) -> torch.Tensor:
        allowed = visible(self.pos, self.k_pos, self.k_visual, sees_visual)
        # Visual and padding queries are thrown away, but a row that sees nothing is NaN, and NaN spreads: it sees all.
        allowed |= ~allowed.any(-1, keepdims=True)
        return self.call.tensor(allowed)[:, None]

    def start(self, text, visual):
        at = np.where(self.padding, 0, self.tokens.source[self.index])
        self.rope = self.call.rotary(self.call.tensor(np.maximum(self.pos, 0)), text.dtype)
        hidden = torch.cat([text, visual])[self.call.tensor(at)]
        return hidden, hidden

    def show(self, block: Block, frozen):
        return frozen

    def see(self, block: Block, shown):
        return ()

    def attend(self, block: Block, hidden):
        plan = self.call.plan[block.layer_idx]
        attention, normed = block.self_attn, block.input_layernorm(hidden)
        q = attention.queries(normed, self.rope).transpose(1, 2)
        k, v = (x.transpose(1, 2) for x in attention.keys_values(normed, self.rope))
        if self.call.cache is not None:
            k, v = self.call.cache.update(k, v, block.layer_idx)
        mixed = self.heads(q, k, v, self.masks[plan.reads])
        update = attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return hidden + (update if plan.prefix_attends else update.masked_fill(self.prefix, 0))

    def settle(self, block: Block, hidden, shown):
        return hidden if self.call.plan[block.layer_idx].updates else torch.where(self.visual, shown, hidden)

    def text(self, hidden):
        return hidden.flatten(0, 1)[self._text_rows]

    @property
    def _text_rows(self) -> torch.Tensor:
        length = self.index.shape[1]
        flat = np.empty(len(self.tokens), np.int64)
        row, column = np.nonzero(~self.padding)
        flat[self.index[row, column]] = row * length + column
        return self.call.tensor(flat[~self.tokens.visual])
