"""mask: the slow, obvious flow and the referee of accel.

Every token of the expanded sequence is a hidden state in every layer; an explicit [B, 1, queries, keys] mask says which
query sees which key, and tokens that the plan freezes are put back after each layer. The rule in words:

    a query sees a key of its sequence that stands no later than itself and that no drop has taken away; of visual keys,
    text sees those of layers in which it reads them, and visual tokens those of layers that update them

A drop waits for the device, so that everything about order and positions is plain numpy here.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.attention import eager_heads, sdpa_heads
from ..kernels.pointwise import Rope
from ..plan.layer import Drop, LayerPlan, drops_before
from ..utils.errors import ViCAError
from .backbone_llama import Block
from .cache import CacheEntries
from .call import Call, Packs, Run, among_ranks
from .layout import Tokens, last_text_tokens, pad_index, ranks_in_row
from .scores import attention_rows, keep_highest


def visible(
    q_pos: np.ndarray, q_visual: np.ndarray, k_pos: np.ndarray, k_visual: np.ndarray, plan: LayerPlan
) -> np.ndarray:
    """Returns who sees whom, [B, queries, keys], from order (negative: padding) and visual flags, [B, queries] and
    [B, keys]."""
    causal = (k_pos[:, None] >= 0) & (k_pos[:, None] <= q_pos[:, :, None])
    sees_visual = np.where(q_visual, plan.updates, plan.reads)
    return causal & (sees_visual[:, :, None] | ~k_visual[:, None])


@dataclass(eq=False)
class Present:
    """The tokens of the layers between two drops, padded to [B, L]."""

    segment: int
    tokens: Tokens
    pos: np.ndarray  # [E] rotary positions
    index: np.ndarray  # [B, L] into the tokens, -1 where padding
    entries: CacheEntries  # of all keys, those of earlier calls first
    scores: torch.Tensor | None = None  # of each visual token, for a drop before the next layer

    @property
    def padding(self) -> np.ndarray:
        return self.index < 0

    def padded(self, values: np.ndarray, fill: int | bool) -> np.ndarray:
        return np.where(self.padding, fill, values[self.index]) if len(values) else np.full(self.index.shape, fill)


class MaskFlow:
    def __init__(self, call: Call) -> None:
        self.call = call
        self.heads = eager_heads if call.kernel.is_eager else sdpa_heads
        self.segments = drops_before(call.plan)
        self.gaps = [np.zeros(call.tokens.batch, np.int64)] * len(call.closed_gaps)
        self.masks: dict[tuple[int, LayerPlan], torch.Tensor] = {}
        if call.cache is not None:
            call.cache.layer_kinds = [(segment, True) for segment in self.segments]

    # --- where tokens stand ---

    def _present(self, segment: int, tokens: Tokens, pos: np.ndarray) -> Present:
        cache = self.call.cache
        entries = CacheEntries.empty(tokens.batch)
        if cache is not None and segment in self.segments:
            entries = cache.entries((segment, True))
        entries.append(tokens)
        return Present(segment, tokens, pos, pad_index(tokens.row, tokens.batch), entries)

    def start(self, text: torch.Tensor, visual: torch.Tensor) -> Packs[Present]:
        tokens = self.call.tokens
        present = self._present(0, tokens, tokens.pos - self.call.closed_gaps[0][tokens.row])
        source = np.where(tokens.visual, np.cumsum(tokens.visual), np.cumsum(~tokens.visual)) - 1
        source += tokens.visual * len(text)
        return Packs(torch.cat([text, visual])[self.call.tensor(present.padded(source, 0))], None, present)

    def needs_visual(self, block: Block, packs: Packs[Present]) -> bool:
        return False

    def text(self, packs: Packs[Present]) -> torch.Tensor:
        here, tokens = np.nonzero(~packs.place.padding.ravel())[0], packs.place.tokens
        return packs.x.flatten(0, 1)[self.call.tensor(here[~tokens.visual])]

    # --- one layer ---

    def layer(
        self, block: Block, x: torch.Tensor, visual: torch.Tensor | None, place: Present, run: Run
    ) -> tuple[torch.Tensor, None, Present]:
        plan = self.call.plan[block.layer_idx]
        if plan.drop is not None:
            x, place = self._drop(block, plan.drop, x, place)
        x, scores = run(self._update, block, plan, x, place)
        place.scores = scores
        return x, None, place

    def _update(
        self, block: Block, plan: LayerPlan, x: torch.Tensor, place: Present
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention, normed, rope = block.self_attn, block.input_layernorm(x), self._rope(place, x.dtype)
        q = attention.queries(normed, rope).transpose(1, 2)
        k, v = (t.transpose(1, 2) for t in attention.keys_values(normed, rope))
        if self.call.cache is not None:
            k, v = self.call.cache.update(k, v, block.layer_idx)
        update = attention.o_proj(self.heads(q, k, v, self._mask(plan, place)).transpose(1, 2).flatten(2))
        if not plan.prefix_attends:
            update = update.masked_fill(self._flags(place, place.tokens.prefix), 0)
        hidden = block.feed(x + update)
        if not plan.updates:
            hidden = torch.where(self._flags(place, place.tokens.visual), x, hidden)
        scores = None
        watchers = self.call.watchers(block.layer_idx)
        if watchers or self.call.ranks_by(block.layer_idx):
            weights, visual = self._attention_of_last(q.transpose(1, 2), k.transpose(1, 2), plan, place, place.entries)
            for tap in watchers:
                tap.take(block.layer_idx, weights, visual & plan.reads)
            scores = weights.mean(1)[self.call.tensor(visual)]
        return hidden, scores

    def _rope(self, place: Present, dtype: torch.dtype) -> Rope:
        return self.call.rotary(self.call.tensor(place.padded(place.pos, 0)), dtype)

    def _flags(self, place: Present, flags: np.ndarray) -> torch.Tensor:
        return self.call.tensor(place.padded(flags, False))[..., None]

    def _mask(self, plan: LayerPlan, place: Present) -> torch.Tensor:
        if (place.segment, plan) not in self.masks:
            allowed = self._visible(plan, place, place.entries)
            # A padding query sees nothing and its softmax is NaN, which spreads through 0 * NaN: let it see all.
            allowed |= ~allowed.any(-1, keepdims=True)
            self.masks[place.segment, plan] = self.call.tensor(allowed)[:, None]
        return self.masks[place.segment, plan]

    def _visible(self, plan: LayerPlan, place: Present, entries: CacheEntries) -> np.ndarray:
        q_pos, q_visual = place.padded(place.tokens.pos, -1), place.padded(place.tokens.visual, False)
        return visible(q_pos, q_visual, entries.pos, entries.visual, plan)

    # --- drops ---

    def _drop(self, block: Block, drop: Drop, x: torch.Tensor, place: Present) -> tuple[torch.Tensor, Present]:
        call, tokens = self.call, place.tokens
        segment = self.segments[block.layer_idx]
        # what earlier calls closed before this segment and not before the last
        pos = place.pos - (call.closed_gaps[segment] - call.closed_gaps[segment - 1])[tokens.row]
        first = call.tokens.visual_counts
        counts = np.array([drop.count(int(n), int(m)) for n, m in zip(first, tokens.visual_counts)])
        scores, stays = place.scores, np.ones(len(tokens), bool)
        fewer = (counts != tokens.visual_counts).any()
        if drop.rank == "own" and (fewer or (block.training and among_ranks())):
            scores = self._own_scores(block, x, place, pos)
        if fewer:
            stays[tokens.visual] = self._staying(drop, counts, scores, place)
        kept, pos, gaps = tokens.select(stays), pos[stays], self.gaps[segment - 1]
        if drop.renumber:
            pos = (call.start - call.closed_gaps[segment])[kept.row] + ranks_in_row(kept.row, kept.batch)
            gaps = call.tokens.counts - kept.counts
        self.gaps[segment] = gaps
        after = self._present(segment, kept, pos)
        where = np.nonzero(~place.padding.ravel())[0][stays]  # of each token that stays, in [B * L]
        index = after.padded(where, 0)
        return x.flatten(0, 1)[call.tensor(index)], after

    def _staying(self, drop: Drop, counts: np.ndarray, scores: torch.Tensor | None, place: Present) -> np.ndarray:
        """Returns a mask over the visual tokens."""
        if drop.rank is None or scores is None:
            return np.zeros(place.tokens.visual.sum(), bool)
        index = pad_index(place.tokens.row[place.tokens.visual], place.tokens.batch)
        at = self.call.tensor(np.maximum(index, 0))
        stays = keep_highest(scores, at, self.call.tensor(index >= 0), self.call.tensor(counts))
        return stays.cpu().numpy()[index >= 0]

    def _own_scores(self, block: Block, x: torch.Tensor, place: Present, pos: np.ndarray) -> torch.Tensor:
        """Returns the attention that this layer would have had on the tokens before the drop."""
        attention, normed = block.self_attn, block.input_layernorm(x)
        rope = self.call.rotary(self.call.tensor(place.padded(pos, 0)), x.dtype)
        q, k = attention.queries(normed, rope), attention.keys(normed, rope)
        entries = CacheEntries.empty(place.tokens.batch)
        cache, kind = self.call.cache, (self.segments[block.layer_idx], True)
        if cache is not None and cache.layers[block.layer_idx].is_initialized:
            past = cache.entries(kind)
            entries = CacheEntries(past.pos.copy(), past.visual.copy())
            k = torch.cat([cache.layers[block.layer_idx].keys.transpose(1, 2), k], dim=1)
        entries.append(place.tokens)
        weights, visual = self._attention_of_last(q, k, self.call.plan[block.layer_idx], place, entries)
        return weights.mean(1)[self.call.tensor(visual)]

    @torch.no_grad()
    def _attention_of_last(
        self, q: torch.Tensor, k: torch.Tensor, plan: LayerPlan, place: Present, entries: CacheEntries
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Returns the attention of each sequence's last text token, [B, H, S], and which of the keys are visual tokens
        of this call, [B, S]."""
        tokens, rows = place.tokens, np.arange(place.tokens.batch)
        last = last_text_tokens(tokens)
        if (wrong := np.nonzero((last < 0) & (tokens.visual_counts > 0))[0]).size:
            raise ViCAError(
                f"row {wrong[0]} ends with an image: visual tokens are ranked by the text that follows them"
            )
        column = np.maximum(tokens.counts - 1, 0)
        seen = self._visible(plan, place, entries)[rows, column]
        seen |= ~seen.any(-1, keepdims=True)  # an empty sequence would be NaN
        visual = np.zeros(entries.pos.shape, bool)
        visual[:, entries.pos.shape[1] - place.index.shape[1] :] = place.padded(tokens.visual, False)
        return attention_rows(q[rows, column], k, self.call.tensor(seen)), visual
