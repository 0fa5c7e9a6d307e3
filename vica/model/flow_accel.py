"""accel: only what a layer updates is a hidden state; visual tokens that it only reads are keys and values.

    layer      hidden states             keys and values
    update     text and visual, joined   of all of them
    read       text                      of text, and of the frozen visual tokens
    skip       text                      of text

Consecutive layers of one kind pass their tensors on as they are; joining and splitting happens where the kind changes
or visual tokens leave. packs.py says where each token stands, attention_accel.py which keys a query sees.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..kernels.pointwise import Rope
from ..plan.layer import Drop, LayerPlan, drops_before
from .attention_accel import LayerAttention, StoredKeys, holds_visual
from .backbone_llama import Block
from .call import Call, KeysValues, Packs, Run, among_ranks
from .packs import Packing, Segment, drop_counts, dropped, first_segment, renumbered, shifted
from .scores import keep_highest


@dataclass(frozen=True, eq=False)
class Place:
    segment: Segment
    joined: bool  # whether x holds text and visual tokens in reading order; else it is the text pack
    scores: torch.Tensor | None = None  # of each visual token, for a drop before the next layer


class AccelFlow:
    def __init__(self, call: Call) -> None:
        self.call = call
        self.packing = Packing(call.tokens, call.device)
        self.segments = drops_before(call.plan)
        self.gaps = [np.zeros(call.tokens.batch, np.int64)] * len(call.closed_gaps)
        self.attentions: dict[tuple[int, LayerPlan], LayerAttention] = {}
        self.stored: dict[tuple[int, bool], StoredKeys] = {}
        self.ropes: dict[int, tuple[torch.Tensor, Rope]] = {}
        if call.cache is not None:
            call.cache.layer_kinds = [(s, holds_visual(plan)) for s, plan in zip(self.segments, call.plan)]

    def start(self, text: torch.Tensor, visual: torch.Tensor) -> Packs[Place]:
        packing, tokens = self.packing, self.call.tokens
        segment = first_segment(packing, tokens.pos - self.call.closed_gaps[0][tokens.row])
        rank = np.cumsum(~tokens.visual) - 1
        # `visual` may be empty and still must stay in the graph: a projector among ranks wants its gradients.
        x = torch.cat([text, visual]).index_select(0, packing.tensor(rank[packing.text]))
        return Packs(x, visual, Place(segment, joined=False))

    def needs_visual(self, block: Block, packs: Packs[Place]) -> bool:
        plan = self.call.plan[block.layer_idx]
        if packs.place.joined or packs.visual is None:
            return False
        if len(packs.visual):
            return plan.drop is not None or plan.updates or plan.reads_frozen
        return plan.reads_frozen and block.training and among_ranks()

    def text(self, packs: Packs[Place]) -> torch.Tensor:
        segment = packs.place.segment
        index = segment.text_in_order
        return packs.x.index_select(0, segment.text_in_joined[index] if packs.place.joined else index)

    # --- one layer ---

    def layer(
        self, block: Block, x: torch.Tensor, visual: torch.Tensor | None, place: Place, run: Run
    ) -> tuple[torch.Tensor, torch.Tensor | None, Place]:
        plan = self.call.plan[block.layer_idx]
        segment, joined, moved = place.segment, place.joined, None
        if joined and not (plan.updates and plan.drop is None):
            x, moved = segment.split(x)
            visual, joined = moved, False
        if plan.drop is not None:
            visual, segment = self._drop(block, plan.drop, x, visual, place)
            moved = visual
        attention = self._attention(segment, plan)
        if plan.updates:
            x = x if joined else segment.join(x, visual)
            x, scores = run(attention.update_joined, block, x)
        else:
            frozen = self._frozen_kv(block, plan, visual, segment)
            x, scores = run(attention.update_text, block, x, *frozen)
        return x, None if plan.updates else moved, Place(segment, plan.updates, scores)

    def _attention(self, segment: Segment, plan: LayerPlan) -> LayerAttention:
        key = (segment.index, replace(plan, drop=None))
        if key not in self.attentions:
            self.attentions[key] = LayerAttention(self, segment, plan)
        return self.attentions[key]

    def _frozen_kv(
        self, block: Block, plan: LayerPlan, visual: torch.Tensor | None, segment: Segment
    ) -> KeysValues | tuple[()]:
        """Returns keys and values of the visual tokens that the layer reads, or nothing. They stay outside gradient
        checkpoints: they are small, and computing them twice costs as much as the text does."""
        if visual is None or not plan.reads_frozen or not (len(visual) or (block.training and among_ranks())):
            return ()
        rope = self.rope(segment.visual_pos, visual.dtype)
        return block.self_attn.keys_values(block.input_layernorm(visual), rope)

    def rope(self, pos: torch.Tensor, dtype: torch.dtype) -> Rope:
        if id(pos) not in self.ropes:
            self.ropes[id(pos)] = pos, self.call.rotary(pos, dtype)  # kept with `pos`, whose id is its own that long
        return self.ropes[id(pos)][1]

    # --- the cache ---

    def stored_keys(self, segment: Segment, with_visual: bool) -> StoredKeys:
        key = (segment.index, with_visual)
        if key not in self.stored:
            self.stored[key] = StoredKeys(self, segment, with_visual)
        return self.stored[key]

    # --- drops ---

    def _drop(
        self, block: Block, drop: Drop, x: torch.Tensor, visual: torch.Tensor | None, place: Place
    ) -> tuple[torch.Tensor | None, Segment]:
        """Returns the visual pack and the segment behind the drop."""
        call, index = self.call, place.segment.index + 1
        segment = shifted(place.segment, call.closed_gaps[index] - call.closed_gaps[index - 1])
        counts = drop_counts(drop, segment)
        fewer = bool((counts != segment.visual_counts).any())
        scores = place.scores
        if drop.rank == "own" and (fewer or (block.training and among_ranks())):
            scores = self._own_scores(block, x, x[:0] if visual is None else visual, segment)
        if fewer and visual is not None:
            stays = None if drop.rank is None else self._staying(segment, scores, counts)
            visual = visual[:0] if stays is None else visual.index_select(0, stays)
            segment = dropped(segment, counts, stays)
        self.gaps[index] = self.gaps[index - 1]
        if drop.renumber:
            self.gaps[index] = call.tokens.counts - segment.tokens.counts
            if self.gaps[index].any():
                segment = renumbered(segment, call.start - call.closed_gaps[index])
        return visual, segment

    def _staying(self, segment: Segment, scores: torch.Tensor | None, counts: np.ndarray) -> torch.Tensor:
        """Returns the rows of the visual pack that stay, in order. Their number is known here, so nothing waits."""
        assert scores is not None, "a plan without the scores that its drops rank by is refused before"
        index, tensor = segment.visual_padded, self.packing.tensor
        at = tensor(np.maximum(index, 0))
        stays = keep_highest(scores, at, tensor(index >= 0), tensor(counts))
        return torch.where(stays, at, len(segment.visual)).flatten().sort().values[: int(counts.sum())]

    @torch.no_grad()
    def _own_scores(self, block: Block, x: torch.Tensor, visual: torch.Tensor, segment: Segment) -> torch.Tensor:
        """Returns the attention that this layer would have had on the tokens before the drop."""
        plan, attention = self.call.plan[block.layer_idx], block.self_attn
        layer = LayerAttention(self, segment, plan)
        text, rope = block.input_layernorm(x), self.rope(segment.text_pos, x.dtype)
        last = layer.last_text_rows
        q = attention.queries(
            text.index_select(0, last), (rope[0].index_select(0, last), rope[1].index_select(0, last))
        )
        k_visual = attention.keys(block.input_layernorm(visual), self.rope(segment.visual_pos, x.dtype))
        past, past_seen = self.stored_keys_before(block.layer_idx, segment)
        k = torch.cat([attention.keys(text, rope), k_visual])
        return layer.scores(layer.attention_of_last(q, k, past, past_seen), past_seen.shape[1])

    def stored_keys_before(self, layer_idx: int, segment: Segment) -> tuple[torch.Tensor | None, np.ndarray]:
        """Returns the keys of earlier calls that the layer holds, [B, S, G, D], and which of them text may read."""
        cache, plan = self.call.cache, self.call.plan[layer_idx]
        if cache is None or self.call.fresh:
            return None, np.zeros((self.call.tokens.batch, 0), bool)
        entries = cache.entries((segment.index, holds_visual(plan)))
        keys = cache.layers[layer_idx].keys
        return keys.transpose(1, 2), entries.readable(plan.reads)
