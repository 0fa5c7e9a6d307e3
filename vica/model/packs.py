"""Where the tokens of a call stand in accel: two packs, and the order that ties them together.

    text pack     every text token of the batch: first the prefixes of all sequences, then the rest. Its size never
                  changes, so labels, logits and loss know nothing of drops.
    visual pack   the visual tokens that are still there, in reading order. A drop shortens it.
    joined        both in reading order, as layers that update visual tokens want them

Prefix first makes "all but the prefix" a slice, for layers that give the prefix no attention update.

All sizes are known on the host before layer 0; after a ranked drop only the device knows which visual tokens stayed.
For causality that seldom matters: as long as no text stands between the images that a sequence's call brought, any
choice of the same size lies alike between the text, so the host takes the first ones as stand-ins. Otherwise the
segment is `scattered`, and its order lives on the device.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..kernels.transfer import to_device
from ..plan.layer import Drop
from .layout import Tokens, pad_index, ranks_in_row


class Packing:
    """Everything that stays the same from segment to segment."""

    def __init__(self, tokens: Tokens, device: torch.device) -> None:
        self.tokens, self.device = tokens, device
        text = np.nonzero(~tokens.visual)[0]
        self.text = text[np.argsort(~tokens.prefix[text], kind="stable")]  # token of each row of the text pack
        self.visual = np.nonzero(tokens.visual)[0]
        self.prefix_rows = int(tokens.prefix.sum())
        self.row_of_text = np.empty(len(tokens), np.int64)
        self.row_of_text[self.text] = np.arange(len(self.text))
        self.splits_images = self._splits_images()

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return to_device(array, self.device)

    def _splits_images(self) -> bool:
        """Returns whether text stands between two images of a sequence."""
        row, pos = self.tokens.row[self.visual], self.tokens.pos[self.visual]
        return bool(((np.diff(row) == 0) & (np.diff(pos) > 1)).any())

    @cached_property
    def order(self) -> np.ndarray:
        """A number for each token by which reading order sorts the whole batch."""
        return self.tokens.row * (int(self.tokens.pos.max(initial=0)) + 1) + self.tokens.pos


@dataclass(eq=False)
class Segment:
    """The layers between two drops: the same tokens at the same positions.

    `visual` are the tokens of the visual pack, stand-ins where `kept` is given: the index, on the device, of those
    that stayed among the call's visual tokens.
    """

    packing: Packing
    index: int
    visual: np.ndarray
    kept: torch.Tensor | None
    text_pos: torch.Tensor  # rotary positions of the packs, on the device
    visual_pos: torch.Tensor

    @cached_property
    def scattered(self) -> bool:
        return self.kept is not None and self.packing.splits_images and len(self.visual) > 0

    @cached_property
    def visual_counts(self) -> np.ndarray:
        """Visual tokens of each sequence, [B]."""
        return np.bincount(self.packing.tokens.row[self.visual], minlength=self.packing.tokens.batch)

    @cached_property
    def present(self) -> np.ndarray:
        """The tokens in reading order."""
        return np.sort(np.concatenate([self.packing.text, self.visual]))

    @cached_property
    def tokens(self) -> Tokens:
        return self.packing.tokens.select(self.present)

    @cached_property
    def row_of(self) -> np.ndarray:
        """The row of each present token in [text pack; visual pack], by the host's knowledge."""
        return self.pack_row[self.present]

    @cached_property
    def pack_row(self) -> np.ndarray:
        """The row of each of the call's tokens in [text pack; visual pack]; undefined for those that have left."""
        place = self.packing.row_of_text.copy()
        place[self.visual] = len(self.packing.text) + np.arange(len(self.visual))
        return place

    # --- joining and splitting ---

    @cached_property
    def to_joined(self) -> torch.Tensor:
        """The row of each joined token in [text pack; visual pack]."""
        if not self.scattered:
            return self.packing.tensor(self.row_of)
        order = self.packing.tensor(self.packing.order)
        text, visual = self.packing.tensor(self.packing.text), self.packing.tensor(self.packing.visual)
        return torch.cat([order[text], order[visual][self.kept]]).argsort()

    @cached_property
    def from_joined(self) -> torch.Tensor:
        """The place of each row of [text pack; visual pack] among the joined tokens."""
        if not self.scattered:
            return self.packing.tensor(np.argsort(self.row_of, kind="stable"))
        return torch.empty_like(self.to_joined).scatter_(
            0, self.to_joined, torch.arange(len(self.to_joined), device=self.to_joined.device)
        )

    @property
    def text_in_joined(self) -> torch.Tensor:
        return self.from_joined[: len(self.packing.text)]

    @property
    def visual_in_joined(self) -> torch.Tensor:
        return self.from_joined[len(self.packing.text) :]

    def join(self, text: torch.Tensor, visual: torch.Tensor | None) -> torch.Tensor:
        """Returns both packs in reading order."""
        both = text if visual is None else torch.cat([text, visual])
        return both.index_select(0, self.to_joined)

    def split(self, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return joined.index_select(0, self.text_in_joined), joined.index_select(0, self.visual_in_joined)

    @cached_property
    def joined_pos(self) -> torch.Tensor:
        return torch.cat([self.text_pos, self.visual_pos]).index_select(0, self.to_joined)

    @cached_property
    def joined_prefix(self) -> torch.Tensor:
        """Marks the prefix among the joined tokens. It stands before all images, so the host knows where."""
        return self.packing.tensor(self.tokens.prefix)[:, None]

    @cached_property
    def text_in_order(self) -> torch.Tensor:
        """The row of each text token of the text pack, in reading order."""
        return self.packing.tensor(self.packing.row_of_text[np.sort(self.packing.text)])

    # --- padded packs ---

    @cached_property
    def visual_padded(self) -> np.ndarray:
        """[B, most] rows of the visual pack, -1 where padding."""
        return pad_index(self.packing.tokens.row[self.visual], self.packing.tokens.batch)

    @cached_property
    def text_padded(self) -> np.ndarray:
        """[B, most] rows of the text pack, in reading order, -1 where padding."""
        order = np.sort(self.packing.text)
        index = pad_index(self.packing.tokens.row[order], self.packing.tokens.batch)
        return np.where(index < 0, -1, self.packing.row_of_text[order][index]) if len(order) else index


def first_segment(packing: Packing, pos: np.ndarray) -> Segment:
    """Returns the segment before any drop; `pos` are the rotary positions of the call's tokens."""
    text_pos, visual_pos = packing.tensor(pos[packing.text]), packing.tensor(pos[packing.visual])
    return Segment(packing, 0, packing.visual, None, text_pos, visual_pos)


def shifted(segment: Segment, by: np.ndarray) -> Segment:
    """Returns the segment behind the next drop before anything leaves: `by` [B] is what earlier calls' drops closed
    there, and positions are lower by it."""
    packing, text_pos, visual_pos = segment.packing, segment.text_pos, segment.visual_pos
    if by.any():
        row = packing.tokens.row
        text_pos = text_pos - packing.tensor(by[row[packing.text]])
        visual_pos = visual_pos - packing.tensor(by[row[segment.visual]])
    return Segment(packing, segment.index + 1, segment.visual, segment.kept, text_pos, visual_pos)


def dropped(segment: Segment, counts: np.ndarray, stays: torch.Tensor | None) -> Segment:
    """Returns the segment with `counts` [B] visual tokens: those at `stays` in the visual pack, or none at all."""
    packing = segment.packing
    rank = ranks_in_row(packing.tokens.row[segment.visual], packing.tokens.batch)
    stand_ins = segment.visual[rank < counts[packing.tokens.row[segment.visual]]]
    if stays is None:
        return Segment(packing, segment.index, stand_ins, None, segment.text_pos, segment.visual_pos[:0])
    kept = stays if segment.kept is None else segment.kept[stays]
    return Segment(packing, segment.index, stand_ins, kept, segment.text_pos, segment.visual_pos[stays])


def renumbered(segment: Segment, start: np.ndarray) -> Segment:
    """Returns the segment with positions that count the present tokens only, from `start` [B] on."""
    packing = segment.packing
    pos = packing.tensor(start[segment.tokens.row] + ranks_in_row(segment.tokens.row, segment.tokens.batch))
    both = pos.index_select(0, segment.from_joined)
    text_pos, visual_pos = both.split([len(packing.text), len(segment.visual)])
    return Segment(packing, segment.index, segment.visual, segment.kept, text_pos, visual_pos)


def drop_counts(drop: Drop, segment: Segment) -> np.ndarray:
    """Returns how many visual tokens of each sequence stay, [B]."""
    first = segment.packing.tokens.visual_counts
    return np.array([drop.count(int(n), int(m)) for n, m in zip(first, segment.visual_counts)], np.int64)
