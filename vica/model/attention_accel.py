"""Attention in accel: which text and visual tokens query in a layer, which keys they see, and how keys enter the cache.

All layers of one plan within a segment share a LayerAttention, so indices are made once a call.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..kernels.attention import Runs, eager_heads, sdpa_heads
from ..plan.layer import LayerPlan
from ..utils.errors import ViCAError
from .backbone_llama import Block
from .cache import CacheEntries
from .call import KeysValues
from .layout import last_text_tokens
from .packs import Segment
from .scores import attention_rows

if TYPE_CHECKING:
    from .flow_accel import AccelFlow


def holds_visual(plan: LayerPlan) -> bool:
    """Whether the layer keeps keys of visual tokens: for text, or for visual tokens to come."""
    return plan.updates or plan.reads_frozen


class StoredKeys:
    """How the call's keys enter the cache of all layers that hold the same tokens."""

    def __init__(self, flow: "AccelFlow", segment: Segment, with_visual: bool) -> None:
        assert flow.call.cache is not None
        self.segment, self.with_visual, packing = segment, with_visual, flow.packing
        order = np.sort(packing.text) if not with_visual else segment.present
        if with_visual and segment.scattered:  # the host does not know reading order: visual tokens go first
            order = np.concatenate([segment.visual, np.sort(packing.text)])
            order = order[np.argsort(packing.tokens.row[order], kind="stable")]
        entries = flow.call.cache.entries((segment.index, with_visual))
        self.past = CacheEntries(entries.pos, entries.visual)
        index = entries.append(packing.tokens.select(order))
        self.entries, self.shape = entries, index.shape
        at = np.maximum(index, 0)  # holes take any key, which nothing sees
        self._rows = segment.pack_row[order][at] if len(order) else at
        in_reading_order = not segment.scattered and len(order) == len(segment.present)
        self._joined_rows = at if in_reading_order else None
        self._packing = packing

    @cached_property
    def rows(self) -> torch.Tensor | None:
        """Rows of [text pack; visual pack] in the order of the cache, [B, new]; None where that is theirs already."""
        return self._unless_in_order(self._rows)

    @cached_property
    def joined_rows(self) -> torch.Tensor | None:
        if self._joined_rows is not None:
            return self._unless_in_order(self._joined_rows)
        return self.segment.from_joined[self._packing.tensor(self._rows)]

    def _unless_in_order(self, rows: np.ndarray) -> torch.Tensor | None:
        count = len(self._packing.text) + (len(self.segment.visual) if self.with_visual else 0)
        in_order = rows.size == count and (rows.ravel() == np.arange(rows.size)).all()
        return None if in_order else self._packing.tensor(rows)


class LayerAttention:
    """The part that all layers of one plan share within a segment: which tokens query, which keys they see."""

    def __init__(self, flow: "AccelFlow", segment: Segment, plan: LayerPlan) -> None:
        self.flow, self.segment, self.plan, self.call = flow, segment, plan, flow.call
        self.packing = flow.packing
        self.first_query = 0 if plan.prefix_attends else self.packing.prefix_rows

    # --- the two kinds of layer ---

    def update_text(
        self, block: Block, x: torch.Tensor, *frozen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the text pack after the layer, and scores where the next layer's drop wants them. `frozen`: keys and
        values of the visual tokens that text reads."""
        attention, normed = block.self_attn, block.input_layernorm(x)
        rope = self.flow.rope(self.segment.text_pos, x.dtype)
        k, v = attention.keys_values(normed, rope)
        if frozen:
            k, v = (torch.cat(both) for both in zip((k, v), frozen))
        held = self._store(block.layer_idx, k, v, joined=False)
        first, scores = self.first_query, None
        if first < len(x):  # else every token is a frozen prefix: its K/V are kept, nothing is updated
            q = attention.queries(normed[first:], (rope[0][first:], rope[1][first:]))
            update = attention.o_proj(self._mix_text(q, k, v, held).flatten(1))
            if self._watched(block):
                scores = self._watch(block, q[self.last_text_rows - first], k, held)
            x = torch.cat([x[:first], x[first:] + update]) if first else x + update
        return block.feed(x), scores

    def update_joined(self, block: Block, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns text and visual tokens after the layer, and scores where the next layer's drop wants them."""
        attention, normed = block.self_attn, block.input_layernorm(x)
        rope = self.flow.rope(self.segment.joined_pos, x.dtype)
        q, (k, v) = attention.queries(normed, rope), attention.keys_values(normed, rope)
        held, scores = self._store(block.layer_idx, k, v, joined=True), None
        update = attention.o_proj(self._mix_joined(q, k, v, held).flatten(1))
        if not self.plan.prefix_attends:
            update = update.masked_fill(self.segment.joined_prefix, 0)
        if self._watched(block):
            rows = self.segment.text_in_joined[self.last_text_rows]
            scores = self._watch(block, q[rows], k.index_select(0, self.segment.from_joined), held)
        return block.feed(x + update), scores

    def _store(self, layer_idx: int, k: torch.Tensor, v: torch.Tensor, joined: bool) -> KeysValues | None:
        """Adds the call's K/V to the cache; returns all that the layer holds, [B, H, S, D]."""
        if self.call.cache is None:
            return None
        stored = self.stored
        rows = stored.joined_rows if joined else stored.rows
        k, v = (x.unflatten(0, stored.shape) if rows is None else x[rows] for x in (k, v))
        return self.call.cache.update(k.transpose(1, 2), v.transpose(1, 2), layer_idx)

    @cached_property
    def stored(self) -> StoredKeys:
        return self.flow.stored_keys(self.segment, holds_visual(self.plan))

    # --- attention ---

    def _mix_text(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, held: KeysValues | None) -> torch.Tensor:
        """Returns attention of the text queries, [N, H, D]; `k`, `v`: rows of [text pack; visual pack]."""
        if self._decodes and held is not None:
            return self._mix_single(q, *held)
        if not (self.plan.reads_frozen and self.segment.scattered):
            return self.call.kernel(q, *self._with_past(k, v, held), self._text_runs)
        # Only the device knows which visual tokens stand before which text. Joined, order alone says who sees whom, so
        # visual tokens query too, with zeros, and their results are not used.
        places = self.segment.text_in_joined[self.first_query :]
        joined = q.new_zeros(len(self.segment.present), *q.shape[1:]).index_copy(0, places, q)
        k, v = (x.index_select(0, self.segment.to_joined) for x in (k, v))
        return self.call.kernel(joined, *self._with_past(k, v, held), self._whole_runs).index_select(0, places)

    def _mix_joined(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, held: KeysValues | None) -> torch.Tensor:
        if self._decodes and held is not None:
            return self._mix_single(q, *held)
        if self.plan.text_reads or not len(self.segment.visual) and self.call.fresh:
            return self.call.kernel(q, *self._with_past(k, v, held), self._whole_runs)
        whole = self.call.kernel(q, *self._with_past(k, v, held), self._whole_runs)
        text = self.segment.text_in_joined[self.segment.text_in_order]
        q, k, v = (x.index_select(0, text) for x in (q, k, v))
        return whole.index_copy(0, text, self.call.kernel(q, *self._with_past(k, v, held), self._blind_runs))

    def _with_past(self, k: torch.Tensor, v: torch.Tensor, held: KeysValues | None) -> KeysValues:
        """Returns keys and values behind those of earlier calls, whose [B, S] lie flat in front."""
        if held is None or self.call.fresh:
            return k, v
        past = self.stored.past.pos.shape[1]
        k, v = (torch.cat([x[:, :, :past].transpose(1, 2).flatten(0, 1), y]) for x, y in zip(held, (k, v)))
        return k, v

    @cached_property
    def _decodes(self) -> bool:
        """Whether each sequence has one new token of text, so that the held K/V serve as they lie."""
        tokens = self.call.tokens
        one_each = len(tokens) == tokens.batch and tokens.columns == 1 and not tokens.visual.any()
        return one_each and not self.call.fresh

    @cached_property
    def _holes(self) -> torch.Tensor | None:
        seen = self.stored.entries.readable(self.plan.reads)
        return None if seen.all() else self.packing.tensor(seen)[:, None, None]

    def _mix_single(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = eager_heads if self.call.kernel.is_eager else sdpa_heads
        return heads(q.unsqueeze(2), k, v, self._holes).squeeze(2)

    # --- runs of queries with their keys ---

    def _past_rows(self, text_reads: bool) -> list[np.ndarray]:
        """Returns the rows of earlier calls' keys that each sequence sees, in the buffer of `_with_past`."""
        batch = self.call.tokens.batch
        if self.call.fresh:
            return [np.zeros(0, np.int64)] * batch
        seen = self.stored.past.readable(text_reads)
        return [b * seen.shape[1] + np.nonzero(seen[b])[0] for b in range(batch)]

    @cached_property
    def _own_start(self) -> int:
        return 0 if self.call.fresh else self.stored.past.pos.size

    @cached_property
    def _text_runs(self) -> Runs:
        """The text pack from `first_query` on: the runs of all prefixes first, then the others, each with its keys."""
        segment, tokens = self.segment, self.segment.tokens
        query = np.where(tokens.visual, 0, 1 + tokens.prefix)
        is_key = np.ones(len(tokens), bool) if self.plan.reads_frozen else ~tokens.visual
        prefix_runs: list[tuple[int, np.ndarray]] = []
        text_runs: list[tuple[int, np.ndarray]] = []
        for b, past in enumerate(self._past_rows(self.plan.reads)):
            own = np.nonzero(is_key & (tokens.row == b))[0]
            lists = np.concatenate([past, self._own_start + segment.row_of[own]])
            label = query[own]
            # a run ends where the next key is no query, or where the prefix ends
            edges = np.nonzero(np.diff(label))[0] + 1
            for start, end in zip([0, *edges], [*edges, len(own)]):
                if start < end and label[start]:
                    run = (end - start, lists[: len(past) + end])
                    (prefix_runs if label[start] == 2 else text_runs).append(run)
        if self.first_query:
            prefix_runs = []
        return self._runs(prefix_runs + text_runs, [len(prefix_runs), len(text_runs)])

    @cached_property
    def _whole_runs(self) -> Runs:
        """Every present token of a sequence as one run, joined."""
        return self._contiguous(self.segment.tokens.counts, text_reads=True)

    @cached_property
    def _blind_runs(self) -> Runs:
        """The text of a sequence as one run, over text alone."""
        return self._contiguous(np.bincount(self.call.tokens.row[self.packing.text], minlength=self.call.tokens.batch),
                                text_reads=False)  # fmt: skip

    def _contiguous(self, counts: np.ndarray, text_reads: bool) -> Runs:
        runs, first = [], self._own_start
        for count, past in zip(counts.tolist(), self._past_rows(text_reads)):
            if count:
                runs.append((count, np.concatenate([past, np.arange(first, first + count)])))
            first += count
        return self._runs(runs, [len(runs)])

    def _runs(self, runs: list[tuple[int, np.ndarray]], parts: list[int]) -> Runs:
        return Runs([n for n, _ in runs], [keys for _, keys in runs], parts, self.call.device)

    # --- scores ---

    @cached_property
    def last_text_rows(self) -> torch.Tensor:
        """The row of each sequence's last token in the text pack; any row where no visual token could be ranked."""
        last = last_text_tokens(self.call.tokens)
        if (wrong := np.nonzero((last < 0) & (self.segment.visual_counts > 0))[0]).size:
            raise ViCAError(
                f"row {wrong[0]} ends with an image: visual tokens are ranked by the text that follows them"
            )
        some = self.packing.text[-1] if len(self.packing.text) else 0
        return self.packing.tensor(self.packing.row_of_text[np.where(last < 0, some, last)])

    def _watched(self, block: Block) -> bool:
        return self.call.ranks_by(block.layer_idx) or bool(self.call.watchers(block.layer_idx))

    @torch.no_grad()
    def _watch(self, block: Block, q: torch.Tensor, k: torch.Tensor, held: KeysValues | None) -> torch.Tensor | None:
        """Shows the layer's attention to its taps; returns the scores that the next layer's drop ranks by, if any."""
        past, past_seen = None, np.zeros((self.call.tokens.batch, 0), bool)
        if held is not None and not self.call.fresh:
            past_seen = self.stored.past.readable(self.plan.reads)
            past = held[0][:, :, : past_seen.shape[1]].transpose(1, 2)
        weights = self.attention_of_last(q, k, past, past_seen)
        visual = np.zeros(weights.shape[::2], bool)
        visual[:, past_seen.shape[1] :][:, : self._visual_columns.shape[1]] = self._visual_columns >= 0
        for tap in self.call.watchers(block.layer_idx):
            tap.take(block.layer_idx, weights, visual)
        return self.scores(weights, past_seen.shape[1]) if self.call.ranks_by(block.layer_idx) else None

    @cached_property
    def _visual_columns(self) -> np.ndarray:
        """[B, most] rows of the visual pack that text reads, -1 where padding."""
        visual = self.segment.visual_padded
        return visual if self.plan.reads else visual[:, :0]

    def attention_of_last(
        self, q: torch.Tensor, k: torch.Tensor, past: torch.Tensor | None, past_seen: np.ndarray
    ) -> torch.Tensor:
        """Returns the attention of each sequence's last text token, [B, H, S]: keys of earlier calls come first, then
        visual tokens, then text.

        `q` [B, H, D]; `k`: rows of [text pack; visual pack]; `past` [B, S, G, D] with `past_seen` [B, S].
        """
        visual, tensor = self._visual_columns, self.packing.tensor
        visual = np.where(visual < 0, -1, visual + len(self.packing.text))
        index = np.concatenate([visual, self.segment.text_padded], axis=1)
        keys = k[tensor(np.maximum(index, 0))]
        if past is not None:
            keys = torch.cat([past, keys], dim=1)
        seen = np.concatenate([past_seen, index >= 0], axis=1)
        return attention_rows(q, keys, tensor(seen | ~seen.any(1, keepdims=True)))  # an empty row would be NaN

    def scores(self, weights: torch.Tensor, past: int) -> torch.Tensor:
        """Returns the mean over heads of the attention to each visual token of the pack; `past` columns precede."""
        visual, mean = self._visual_columns, weights.mean(1)
        at = past + np.arange(len(visual))[:, None] * mean.shape[1] + np.arange(visual.shape[1])
        return mean.flatten().index_select(0, self.packing.tensor(at[visual >= 0]))
