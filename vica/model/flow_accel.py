"""accel: only the rows that are updated are hidden states; frozen tokens are keys and values, nothing more.

    hidden   [N, width]   text of all rows of the batch, packed: first every row's prefix, then the rest
    frozen   [M, width]   visual tokens, never updated; a T2V layer norms and projects them to its own K/V

Prefix first makes "all but the prefix" a slice: where the prefix is frozen, queries start at row `prefix_rows`.
The dense variant is the same flow with nothing frozen: its visual tokens are hidden states too, and its prefix is text
like any other.
"""

from functools import cached_property

import numpy as np
import torch

from ..kernels.attention import Runs, eager_heads, sdpa_heads
from ..plan.layer import LayerPlan
from .backbone_llama import Block, Call, among_ranks


class AccelFlow:
    def __init__(self, call: Call):
        self.call, self.tokens = call, call.tokens
        tokens, plan = call.tokens, call.plan
        live = ~tokens.visual | plan[0].updates
        rows = np.nonzero(live)[0]
        self.prefix = tokens.prefix & (not plan[0].updates)
        self.packed = rows[np.argsort(~self.prefix[rows], kind="stable")]  # token of each hidden row
        self.prefix_rows = int(self.prefix.sum())
        self.frozen_tokens = np.nonzero(~live)[0]
        self.slot = np.empty(len(tokens), np.int64)  # row of each token in [hidden; frozen]
        self.slot[np.concatenate([self.packed, self.frozen_tokens])] = np.arange(len(tokens))
        self.live = live
        self.fresh = call.cache is None or call.cache.get_seq_length() == 0
        self.routes = {p: Route(self, p) for p in dict.fromkeys(plan)}
        self.entries = self._enter_books() if call.cache is not None else {}

    def _enter_books(self) -> dict[str, tuple[tuple[int, int], torch.Tensor | None]]:
        """Each book's new entries as rows of [hidden; frozen]: their shape [B, S] and index, none where they lie in
        order already, as in decoding. Holes point at row 0 and are never seen."""
        self.call.cache.layer_books = [self.routes[p].book for p in self.call.plan]
        entries = {}
        for route in self.routes.values():
            if route.book not in entries:
                index = self.call.cache.book(route.book).append(self.tokens, route.keys)
                rows = self.slot[np.nonzero(route.keys)[0]]
                index = np.where(index < 0, 0, rows[index]) if len(rows) else index
                in_order = index.size == len(self.tokens) and (index.ravel() == np.arange(index.size)).all()
                entries[route.book] = (index.shape, None if in_order else self.call.tensor(index))
        return entries

    def start(self, text, visual):
        self.rope = self.call.rotary(self.call.tensor(self.tokens.pos[self.packed]), text.dtype)
        self.frozen_rope = self.call.rotary(self.call.tensor(self.tokens.pos[self.frozen_tokens]), text.dtype)
        frozen = visual if len(self.frozen_tokens) else visual[:0]
        return torch.cat([text, visual])[self.call.tensor(self.tokens.source[self.packed])], frozen

    def show(self, block: Block, frozen):
        needed = len(frozen) or (block.training and among_ranks())
        return frozen if needed and self.routes[self.call.plan[block.layer_idx]].reads_frozen else None

    def see(self, block: Block, shown):
        return () if shown is None else block.self_attn.keys_values(block.input_layernorm(shown), self.frozen_rope)

    def attend(self, block: Block, hidden, *seen):
        route = self.routes[self.call.plan[block.layer_idx]]
        attention, normed = block.self_attn, block.input_layernorm(hidden)
        k, v = attention.keys_values(normed, self.rope)
        if seen:
            k, v = (torch.cat(both) for both in zip((k, v), seen))
        first = route.first_query
        if first == len(hidden):  # every row is a frozen prefix: its K/V are kept, nothing is updated
            route.store(block.layer_idx, k, v)
            return hidden
        q = attention.queries(normed[first:], tuple(t[first:] for t in self.rope))
        update = attention.o_proj(route.mix(block.layer_idx, q, k, v).flatten(1))
        return torch.cat([hidden[:first], hidden[first:] + update]) if first else hidden + update

    def settle(self, block: Block, hidden, shown):
        return hidden

    def text(self, hidden):
        return hidden[self._text_rows]

    @cached_property
    def _text_rows(self) -> torch.Tensor:
        return self.call.tensor(self.slot[~self.tokens.visual])


class Route:
    """What all layers of one plan share in a call: who queries, which keys they see, where K/V are kept."""

    def __init__(self, flow: AccelFlow, plan: LayerPlan):
        tokens = flow.tokens
        self.flow, self.cache = flow, flow.call.cache
        self.reads_frozen = plan.reads_frozen
        self.keys = np.ones(len(tokens), bool) if plan.reads else ~tokens.visual
        self.first_query = 0 if plan.prefix_attends else flow.prefix_rows
        self.book = "all" if plan.reads else "text"

    def store(self, layer_idx: int, k, v):
        """Adds the call's K/V to the cache; returns all that the layer holds, [B, H, S, D]."""
        if self.cache is None:
            return None
        shape, rows = self.flow.entries[self.book]
        k, v = (x.unflatten(0, shape) if rows is None else x[rows] for x in (k, v))
        return self.cache.update(k.transpose(1, 2), v.transpose(1, 2), layer_idx)

    def mix(self, layer_idx: int, q, k, v):
        """Attention of the call's queries, [N, H, D]."""
        held = self.store(layer_idx, k, v)
        if self.one_each:
            return self._mix_single(q, *held)
        if not self.flow.fresh:
            k, v = (x.transpose(1, 2).flatten(0, 1) for x in held)
        return self.flow.call.kernel(q, k, v, self.runs)

    @cached_property
    def one_each(self) -> bool:
        """A decode step: one new token in every row, so the held K/V serve as they lie, without gathering."""
        tokens = self.flow.tokens
        return not self.flow.fresh and len(tokens) == tokens.batch and tokens.columns == 1 and not tokens.visual.any()

    @cached_property
    def holes(self) -> torch.Tensor | None:
        pos = self.cache.book(self.book).pos
        return None if (pos >= 0).all() else self.flow.call.tensor(pos >= 0)[:, None, None]

    def _mix_single(self, q, k, v):
        heads = eager_heads if self.flow.call.kernel.is_eager else sdpa_heads
        return heads(q.unsqueeze(2), k, v, self.holes).squeeze(2)

    @cached_property
    def runs(self) -> Runs:
        """The query runs, prefix runs first as the hidden rows lie, each with its keys' rows in the K/V buffer: the
        call's own [hidden; frozen], or the cache's [B * S] when there is a past."""
        tokens, flow = self.flow.tokens, self.flow
        prefix_runs, text_runs = [], []
        for b in range(tokens.batch):
            own = np.nonzero(self.keys & (tokens.row == b))[0]
            lists = flow.slot[own] if flow.fresh else self._held_rows(b)
            past = len(lists) - len(own)
            # a run ends where the next key is no query, or where the prefix ends
            label = np.where(flow.live[own], 1 + flow.prefix[own], 0)
            edges = np.nonzero(np.diff(label))[0] + 1
            for start, end in zip([0, *edges], [*edges, len(own)]):
                if start < end and label[start]:
                    run = (end - start, lists[: past + end])
                    (prefix_runs if label[start] == 2 else text_runs).append(run)
        if self.first_query:
            prefix_runs = []
        runs = prefix_runs + text_runs
        return Runs([n for n, _ in runs], [x for _, x in runs], [len(prefix_runs), len(text_runs)], flow.call.device)

    def _held_rows(self, b: int) -> np.ndarray:
        pos = self.cache.book(self.book).pos
        return b * pos.shape[1] + np.nonzero(pos[b] >= 0)[0]
