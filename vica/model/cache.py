"""The KV cache of all variants: transformers' dynamic layers, and entries that say which token each key is.

Layers hold different tokens: in accel, layers that read visual tokens hold them beside the text and the others hold
text alone; behind a drop there are fewer. So order, padding and visibility come from the entries, never from a layer's
length. Layers that hold the same tokens share their entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..plan.layer import LayerPlan, drops_before
from ..utils.errors import ViCAError
from .layout import Tokens, pad_index

Kind = tuple[int, bool]  # segment (drops before the layer), and whether the layer holds visual tokens


@dataclass
class CacheEntries:
    """The keys that layers of one kind hold: their order in the sequence (-1: a hole left by padding), and whether
    they are visual."""

    pos: np.ndarray  # [B, S]
    visual: np.ndarray  # [B, S]

    @classmethod
    def empty(cls, batch: int) -> "CacheEntries":
        return cls(np.zeros((batch, 0), np.int64), np.zeros((batch, 0), bool))

    def append(self, tokens: Tokens) -> np.ndarray:
        """Adds the tokens, which are sorted by row; returns [B, new] indices into them, -1 for holes."""
        index = pad_index(tokens.row, tokens.batch)
        self.pos = np.concatenate([self.pos, np.where(index < 0, -1, _take(tokens.pos, index))], axis=1)
        self.visual = np.concatenate([self.visual, _take(tokens.visual, index) & (index >= 0)], axis=1)
        return index

    def select(self, rows: np.ndarray) -> None:
        self.pos, self.visual = self.pos[rows], self.visual[rows]

    def readable(self, text_reads: bool) -> np.ndarray:
        """Returns the keys that text may read, [B, S]."""
        return (self.pos >= 0) & (text_reads | ~self.visual)


def _take(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    return values[index] if len(values) else np.zeros(index.shape, values.dtype)


class KVLayer(DynamicLayer):
    """Keeps the first K/V as they are, where transformers' layer copies them onto an empty tensor."""

    keys: torch.Tensor  # [B, G, S, D]
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class ViCACache(Cache):
    """Made by `forward` or `generate`; give it back with the next turn's tokens. `get_seq_length()` counts columns of
    input_ids (a placeholder is one), because generate slices by it."""

    layers: list[KVLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[KVLayer() for _ in range(num_layers)])
        self._forget()

    def _forget(self) -> None:
        self.wiring: tuple[str, list[LayerPlan]] | None = None  # K/V of one variant or plan mean nothing to another
        self.kinds: dict[Kind, CacheEntries] = {}
        self.layer_kinds: list[Kind] = []  # of each layer, set by the flow that writes it
        self.ids = np.zeros((0, 0), np.int64)
        self.valid = np.zeros((0, 0), bool)
        self.next_pos = np.zeros(0, np.int64)
        self.closed_gaps = np.zeros((1, 0), np.int64)
        self.seen_image = np.zeros(0, bool)

    def open(self, batch: int, variant: str, plan: list[LayerPlan]) -> None:
        """Gives an empty cache its size, and raises ViCAError where one cannot be continued. Call it before a pass."""
        if self.wiring is None or not self.ids.size:
            self._forget()
            self.wiring = (variant, plan)
            self.ids, self.valid = np.zeros((batch, 0), np.int64), np.zeros((batch, 0), bool)
            self.next_pos, self.seen_image = np.zeros(batch, np.int64), np.zeros(batch, bool)
            # positions that renumbering drops took from each sequence, by segment
            self.closed_gaps = np.zeros((1 + max(drops_before(plan), default=0), batch), np.int64)
        if self.wiring[0] != variant:
            raise ViCAError(f"past_key_values were made by variant {self.wiring[0]!r}, the model is {variant!r}")
        if self.wiring[1] != plan:
            raise ViCAError("past_key_values were made with other t2v_layers or another prefix rule")
        if len(self.ids) != batch:
            raise ViCAError(f"past_key_values hold {len(self.ids)} rows, input_ids {batch}")

    def entries(self, kind: Kind) -> CacheEntries:
        return self.kinds.setdefault(kind, CacheEntries.empty(len(self.ids)))

    def commit(self, tokens: Tokens, ids: np.ndarray, valid: np.ndarray, gaps: Sequence[np.ndarray]) -> None:
        """Counts the columns, positions and images of a call whose K/V are stored. `gaps`: positions that the call's
        renumbering drops took, by segment."""
        self.ids = np.concatenate([self.ids, ids], axis=1)
        self.valid = np.concatenate([self.valid, valid], axis=1)
        self.next_pos = self.next_pos + tokens.counts
        self.closed_gaps = self.closed_gaps + np.stack(gaps)
        self.seen_image = self.seen_image | (tokens.visual_counts > 0)

    def replace_rows(self, other: "ViCACache", rows: np.ndarray) -> None:
        """Takes the K/V of whole sequences from a cache of the same tokens, whose holes may lie elsewhere."""
        for layer, source, kind in zip(self.layers, other.layers, self.layer_kinds):
            mine, theirs = self.kinds[kind].pos, other.kinds[kind].pos
            for b in rows:
                to = torch.from_numpy(np.nonzero(mine[b] >= 0)[0]).to(layer.keys.device)
                at = torch.from_numpy(np.nonzero(theirs[b] >= 0)[0]).to(layer.keys.device)
                layer.keys[b, :, to] = source.keys[b, :, at]
                layer.values[b, :, to] = source.values[b, :, at]

    def kv_bytes(self) -> list[int]:
        """Returns the bytes of keys and values that each layer holds."""
        return [
            sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)) if layer.is_initialized else 0
            for layer in self.layers
        ]

    def kv_lengths(self) -> np.ndarray:
        """Returns the number of keys that text may read, [layers, B]."""
        plan = self.wiring[1] if self.wiring is not None else []
        readable = [self.kinds[kind].readable(layer.reads).sum(1) for kind, layer in zip(self.layer_kinds, plan)]
        return np.stack(readable) if readable else np.zeros((0, len(self.ids)), np.int64)

    # --- what transformers' generate asks of a cache ---

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.ids.shape[1]

    def reset(self) -> None:
        super().reset()
        self.layers = [KVLayer() for _ in self.layers]
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx.cpu().numpy())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices.cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(np.repeat(np.arange(len(self.ids)), repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a ViCA cache cannot be cut back: assisted generation is not supported")

    def _select(self, rows: np.ndarray) -> None:
        for entries in self.kinds.values():
            entries.select(rows)
        self.ids, self.valid = self.ids[rows], self.valid[rows]
        self.next_pos, self.seen_image = self.next_pos[rows], self.seen_image[rows]
        self.closed_gaps = self.closed_gaps[:, rows]
