"""mask: the slow, obvious variant and the referee of accel.

Every token of the expanded row is a hidden state in every layer; an explicit [B, 1, queries, keys] mask says who sees
whom, and rows that the plan freezes are put back after each layer. The rule, once more in words:

    a text query sees a key that is no padding, stands no later than itself, and is text, or visual in a T2V layer
"""

import numpy as np
import torch

from .attention import Kernel, eager_heads, sdpa_heads
from .cache import Book, ViCACache
from .llama import Block, Rotary
from .plan import LayerPlan
from .tokens import Tokens, pad_index


def visible(q_pos, k_pos, k_visual, sees_visual: bool) -> np.ndarray:
    """[B, queries, keys] from positions [B, queries], [B, keys] (negative: padding) and visual flags [B, keys]."""
    causal = (k_pos[:, None] >= 0) & (k_pos[:, None] <= q_pos[:, :, None])
    return causal & (sees_visual | ~k_visual[:, None])


class MaskFlow:
    def __init__(
        self,
        plan: list[LayerPlan],
        tokens: Tokens,
        rotary: Rotary,
        cache: ViCACache | None,
        device: torch.device,
        kernel: Kernel,
    ):
        self.plan, self.tokens, self.rotary, self.cache = plan, tokens, rotary, cache
        self.device, self.heads = device, eager_heads if kernel.is_eager else sdpa_heads
        self.index = pad_index(tokens.row, tokens.batch)
        self.padding = self.index < 0
        at = np.where(self.padding, 0, self.index)
        self.pos = np.where(self.padding, -1, tokens.pos[at])
        self.visual = self._tensor(tokens.visual[at] & ~self.padding)[..., None]
        self.prefix = self._tensor(tokens.prefix[at] & ~self.padding)[..., None]
        book = cache.book("all") if cache is not None else Book.empty(tokens.batch)
        book.append(tokens, np.ones(len(tokens), bool))
        self.k_pos, self.k_visual = book.pos, book.visual
        self.masks = {sees: self._mask(sees) for sees in {p.text_sees_visual for p in plan}}

    def _mask(self, sees_visual: bool) -> torch.Tensor:
        allowed = visible(self.pos, self.k_pos, self.k_visual, sees_visual)
        # Visual and padding queries are thrown away, but a row that sees nothing is NaN, and NaN spreads: it sees all.
        allowed |= ~allowed.any(-1, keepdims=True)
        return self._tensor(allowed)[:, None]

    def start(self, text, visual):
        source = np.empty(len(self.tokens), np.int64)
        source[~self.tokens.visual] = np.arange(len(text))
        source[self.tokens.visual] = len(text) + np.arange(len(visual))
        at = np.where(self.padding, 0, source[self.index])
        self.rope = self.rotary(self._tensor(np.maximum(self.pos, 0)), text.dtype)
        hidden = torch.cat([text, visual])[self._tensor(at)]
        return hidden, hidden

    def attend(self, block: Block, hidden, frozen):
        plan = self.plan[block.layer_idx]
        attention, normed = block.self_attn, block.input_layernorm(hidden)
        q = attention.queries(normed, self.rope).transpose(1, 2)
        k, v = (x.transpose(1, 2) for x in attention.keys_values(normed, self.rope))
        if self.cache is not None:
            k, v = self.cache.update(k, v, block.layer_idx)
        mixed = self.heads(q, k, v, self.masks[plan.text_sees_visual])
        update = attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return hidden + (update if plan.prefix_attends else update.masked_fill(self.prefix, 0))

    def settle(self, block: Block, hidden, frozen):
        return hidden if self.plan[block.layer_idx].visual_updated else torch.where(self.visual, frozen, hidden)

    def text(self, hidden):
        return hidden.flatten(0, 1)[self._text_rows]

    @property
    def _text_rows(self) -> torch.Tensor:
        length = self.index.shape[1]
        flat = np.empty(len(self.tokens), np.int64)
        row, column = np.nonzero(~self.padding)
        flat[self.index[row, column]] = row * length + column
        return self._tensor(flat[~self.tokens.visual])

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
