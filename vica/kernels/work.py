"""Describe one pass through the decoder as arrays: positions, K/V indices, and the keys that each row reads.

A row is the hidden state of one token. Attention consists of partial softmaxes that are merged exactly by their
log-sum-exp (LSE). A *tile* is a stretch of rows of one prompt over that prompt's text keys. An *item* is a set of
rows, of any prompts, over a stretch of one image's keys: questions about one image read one copy of its K/V together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

TILE = 64  # most rows of a tile or an item
CHUNK = 64  # an item's number of keys is a multiple of this, except for an image's last item
SHARED_MEMORY = 96 * 2**10  # bytes that a program may use on the cards with the least

Seen = tuple[torch.Tensor, np.ndarray]  # an image's K/V [layers, 2, G, tokens, D], and the rows that see it


@dataclass
class ImageWork:
    """Attention over images. R is the number of (item, row) pairs; each makes one partial result."""

    items: (
        torch.Tensor
    )  # [I, 6] K/V address (in elements), tokens, first key, end of keys, first of `rows`, their number
    rows: torch.Tensor  # [R] the items' rows, one item after another
    starts: torch.Tensor  # [N + 1] where each row's partial results begin in `parts`
    parts: torch.Tensor  # [R] partial results, sorted by row
    kvs: list[torch.Tensor]  # each item's K/V
    block: int  # most rows of an item, rounded up for the kernels


@dataclass
class Step:
    """One pass. N rows, T tiles."""

    positions: torch.Tensor  # [N] for rotary
    kv_index: torch.Tensor  # [N] where the row's K/V go in the pool
    limit: torch.Tensor  # [N] the last text key that the row sees, counted over the tokens of its prompt
    tiles: torch.Tensor  # [T, 3] first row, number of rows, batch slot
    kv_table: torch.Tensor  # [batch slots, tokens] K/V index of each token
    block: int  # most rows of a tile, rounded up for the kernels
    splits: int = 1  # parts that a tile's keys are cut into
    frozen_rows: int = 0  # leading rows without attention update in layers that freeze the system prompt
    frozen_tiles: int = 0
    images: ImageWork | None = None
    last: torch.Tensor | None = None  # rows whose final hidden states are wanted; None: all


@dataclass(frozen=True)
class ImageArrays:
    """ImageWork on the host, with the same names."""

    items: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    parts: np.ndarray
    kvs: list[torch.Tensor]
    block: int

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return dict(items=self.items, rows=self.rows, starts=self.starts, parts=self.parts)

    @staticmethod
    def capacity(rows: int) -> dict[str, int]:
        """Returns the lengths that a captured pass of so many rows reserves; passes that need more run uncaptured."""
        return dict(items=2 * rows + 64, rows=4 * rows + 256, starts=rows + 1, parts=4 * rows + 256)

    def on_device(self, tensors: Mapping[str, torch.Tensor]) -> ImageWork:
        """Returns the work, of tensors that hold `arrays` on the device."""
        t = tensors
        return ImageWork(t["items"], t["rows"], t["starts"], t["parts"], self.kvs, self.block)


def block_of(counts: np.ndarray) -> int:
    """Returns the number of rows that kernels reserve for tiles of these sizes."""
    return max(16, 1 << int(counts.max() - 1).bit_length()) if counts.max() > 1 else 1


def key_blocks(rows: int, key_bytes: int, stages: int) -> tuple[int, int]:
    """Returns the keys of an attention kernel's block, and how many blocks of K and V it holds at once.

    `key_bytes` is the size of one head's key. Keys of at most 256 bytes get the fastest setting on an H200; wider ones
    get what fits beside the rows' queries.
    """
    keys = 64
    if key_bytes <= 256:
        return keys, stages
    while (rows + stages * 2 * keys) * key_bytes > SHARED_MEMORY and (keys, stages) != (16, 1):
        if stages > 2 or keys == 16:  # matrix products take no fewer than 16 keys
            stages -= 1
        else:
            keys //= 2
    return keys, stages


def cut_tiles(first: int, rows: int, batch_slot: int) -> list[tuple[int, int, int]]:
    """Returns the tiles of consecutive rows of one prompt."""
    return [(first + at, min(TILE, rows - at), batch_slot) for at in range(0, rows, TILE)]


def image_arrays(seen: Sequence[Seen], rows: int, items_wanted: int) -> ImageArrays | None:
    """Returns the items of a pass of `rows` rows, or None where no row sees an image.

    Rows that see the same image are gathered. Keys are cut where there would be fewer items than `items_wanted`, which
    fills the device.
    """
    groups = _rows_of_each_image(seen)
    if not groups:
        return None
    cuts = max(1, -(-items_wanted // len(groups)))
    items, kvs, item_rows, first = [], [], [], 0
    for kv, some in groups:
        tokens, address = kv.shape[3], kv.data_ptr() // kv.element_size()
        size = max(1, -(-tokens // cuts // CHUNK)) * CHUNK
        for low in range(0, tokens, size):
            items.append((address, tokens, low, min(low + size, tokens), first, len(some)))
            kvs.append(kv)
            item_rows.append(some)
            first += len(some)
    row_of_part = np.concatenate(item_rows)
    parts = np.argsort(row_of_part, kind="stable")
    starts = np.searchsorted(row_of_part[parts], np.arange(rows + 1))
    block = block_of(np.array([len(some) for _, some in groups]))
    return ImageArrays(np.array(items), row_of_part, starts, parts, kvs, block)


def _rows_of_each_image(seen: Sequence[Seen]) -> list[Seen]:
    """Returns each image with at most TILE of the rows that see it, in several entries where there are more."""
    kv_of: dict[int, torch.Tensor] = {}
    rows_of: dict[int, list[np.ndarray]] = {}
    for kv, rows in seen:
        kv_of.setdefault(kv.data_ptr(), kv)
        rows_of.setdefault(kv.data_ptr(), []).append(rows)
    groups = []
    for address, several in rows_of.items():
        rows = np.concatenate(several)
        groups += [(kv_of[address], rows[i : i + TILE]) for i in range(0, len(rows), TILE)]
    return groups


def image_places(images: Sequence[torch.Tensor], starts: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns where each row of concatenated features goes: its position and its image; and of each image the address
    in elements, the number of tokens and the first row."""
    sizes = np.array([x.shape[3] for x in images])
    first = np.cumsum(sizes) - sizes
    image = np.repeat(np.arange(len(images)), sizes)
    return dict(
        positions=np.array(starts)[image] + np.arange(len(image)) - first[image],
        image=image,
        address=np.array([x.data_ptr() // x.element_size() for x in images]),
        tokens=sizes,
        first=first,
    )
