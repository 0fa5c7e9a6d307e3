"""The KV cache of all variants: transformers' dynamic layers, and a book that says which token each entry is.

Layers hold different numbers of entries: in accel, T2V layers hold visual and text tokens, the others only text. So
positions, padding and visibility are read off the books, never off a layer's length.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..plan.layer import LayerPlan
from ..utils.errors import ViCAError
from .layout import Tokens, pad_index


@dataclass
class Book:
    """One kind of layer's entries: position in the row (-1: a hole left by padding) and whether it is visual."""

    pos: np.ndarray  # [B, S]
    visual: np.ndarray  # [B, S]

    @classmethod
    def empty(cls, batch: int) -> "Book":
        return cls(np.zeros((batch, 0), np.int64), np.zeros((batch, 0), bool))

    def append(self, tokens: Tokens, keys: np.ndarray) -> np.ndarray:
        """Enters the tokens chosen by `keys`; returns [B, new] indices into them, -1 for holes."""
        index = pad_index(tokens.row[keys], tokens.batch)
        pos = np.where(index < 0, -1, _take(tokens.pos[keys], index))
        self.pos = np.concatenate([self.pos, pos], axis=1)
        self.visual = np.concatenate([self.visual, _take(tokens.visual[keys], index) & (index >= 0)], axis=1)
        return index

    def select(self, rows: np.ndarray) -> None:
        self.pos, self.visual = self.pos[rows], self.visual[rows]


def _take(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    return values[index] if len(values) else np.zeros(index.shape, values.dtype)


class KVLayer(DynamicLayer):
    """Keeps the first K/V it is given as they are, where transformers' layer copies them onto an empty tensor."""

    def update(self, key_states, value_states, *args, **kwargs):
        if self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class ViCACache(Cache):
    """Made by `forward` or `generate`; give it back with the next turn's tokens. `get_seq_length()` counts columns of
    input_ids (a placeholder is one), as generate slices by it."""

    def __init__(self, num_layers: int):
        super().__init__(layers=[KVLayer() for _ in range(num_layers)])
        self._forget()

    def _forget(self) -> None:
        self.wiring: tuple | None = None  # K/V of one variant or plan mean nothing to another
        self.books: dict[str, Book] = {}
        self.layer_books: list[str] = []  # the book of each layer, set by the flow that writes them
        self.ids = np.zeros((0, 0), np.int64)
        self.valid = np.zeros((0, 0), bool)
        self.next_pos = np.zeros(0, np.int64)
        self.seen_image = np.zeros(0, bool)

    def open(self, batch: int, variant: str, plan: list[LayerPlan]) -> None:
        """Before a call: makes an empty cache the right size, and refuses one that cannot be continued."""
        if not self.ids.size:
            self._forget()
            self.wiring = (variant, plan)
            self.ids, self.valid = np.zeros((batch, 0), np.int64), np.zeros((batch, 0), bool)
            self.next_pos, self.seen_image = np.zeros(batch, np.int64), np.zeros(batch, bool)
        if self.wiring[0] != variant:
            raise ViCAError(f"past_key_values were made by variant {self.wiring[0]!r}, the model is {variant!r}")
        if self.wiring[1] != plan:
            raise ViCAError("past_key_values were made with other t2v_layers or another prefix rule")
        if len(self.ids) != batch:
            raise ViCAError(f"past_key_values hold {len(self.ids)} rows, input_ids {batch}")

    def book(self, name: str) -> Book:
        return self.books.setdefault(name, Book.empty(len(self.ids)))

    def enter(self, tokens: Tokens, ids: np.ndarray, valid: np.ndarray) -> None:
        """After the books: counts the call's columns, positions and images."""
        self.ids = np.concatenate([self.ids, ids], axis=1)
        self.valid = np.concatenate([self.valid, valid], axis=1)
        self.next_pos = self.next_pos + np.bincount(tokens.row, minlength=tokens.batch)
        self.seen_image = self.seen_image | (np.bincount(tokens.row[tokens.visual], minlength=tokens.batch) > 0)

    def replace_rows(self, other: "ViCACache", rows: np.ndarray) -> None:
        """Takes the K/V of whole rows from a cache of the same tokens, whose holes may lie elsewhere."""
        for layer, source, book in zip(self.layers, other.layers, self.layer_books):
            mine, theirs = self.books[book].pos, other.books[book].pos
            for b in rows:
                to = torch.from_numpy(np.nonzero(mine[b] >= 0)[0]).to(layer.keys.device)
                at = torch.from_numpy(np.nonzero(theirs[b] >= 0)[0]).to(layer.keys.device)
                layer.keys[b, :, to] = source.keys[b, :, at]
                layer.values[b, :, to] = source.values[b, :, at]

    def kv_bytes(self) -> list[int]:
        """Bytes of keys and values held by each layer."""
        return [
            sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)) if layer.is_initialized else 0
            for layer in self.layers
        ]

    # --- what transformers' generate asks of a cache ---

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.ids.shape[1]

    def reset(self) -> None:
        super().reset()
        self.layers = [KVLayer() for _ in self.layers]
        self._forget()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx.cpu().numpy())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices.cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(np.repeat(np.arange(len(self.ids)), repeats))

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError("a ViCA cache cannot be cut back: assisted generation is not supported")

    def _select(self, rows: np.ndarray) -> None:
        for book in self.books.values():
            book.select(rows)
        self.ids, self.valid = self.ids[rows], self.valid[rows]
        self.next_pos, self.seen_image = self.next_pos[rows], self.seen_image[rows]
