"""One pass through the decoder as arrays: where each row stands, the slot it writes to, and the keys it reads.

Attention is made of partial softmaxes that are merged exactly by their log-sum-exp (LSE). A *tile* is a stretch of
rows of one lane over its text keys. An *item* is a set of rows, of any lanes, over a stretch of one image's keys:
questions about one image read one copy of its K/V together.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

TILE = 64  # rows of a tile or an item at most
CHUNK = 64  # an item's keys are a multiple of this, but for the last
SHARED = 96 * 2**10  # bytes of shared memory that a program may have on the cards with the least


@dataclass
class ImageWork:
    items: (
        torch.Tensor
    )  # [I, 6] address of the K/V (in elements), tokens, first key, end of keys, first row, number of rows
    rows: torch.Tensor  # [R] the items' rows, one item after another; each makes a partial result
    starts: torch.Tensor  # [N + 1] where each row's partial results begin in `parts`
    parts: torch.Tensor  # [R] partial results, sorted by row
    kvs: list[torch.Tensor]  # the K/V of each item
    block: int  # rows of an item at most


@dataclass
class Step:
    pos: torch.Tensor  # [N] position, for rotary
    slot: torch.Tensor  # [N] where the row's K/V go
    limit: torch.Tensor  # [N] the last text key it sees, counted over its lane's rows
    tiles: torch.Tensor  # [T, 3] first row, rows, lane
    table: torch.Tensor  # [lanes, rows] slots
    block: int  # rows of a tile at most
    splits: int = 1  # parts that a tile's keys are cut into
    frozen_rows: int = 0  # leading rows without attention update in layers that freeze the prefix
    frozen_tiles: int = 0
    images: ImageWork | None = None
    last: torch.Tensor | None = None  # the rows whose hidden states are asked for; None: all


def to_device(arrays: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """Small arrays of whole numbers, in one copy."""
    arrays = {name: np.asarray(x, np.int64) for name, x in arrays.items()}
    whole = host_tensor(list(arrays.values()), device).to(device, non_blocking=True)
    return views(whole, {name: x.shape for name, x in arrays.items()})


def host_tensor(arrays: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """One after another, where a copy to the device need not be waited for."""
    whole = torch.from_numpy(np.concatenate([x.ravel() for x in arrays]))
    return whole.pin_memory() if device.type == "cuda" else whole


def views(whole: torch.Tensor, shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    parts = whole.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}


def block_of(counts: np.ndarray) -> int:
    """The kernels' number of rows for tiles of these sizes."""
    return max(16, 1 << int(counts.max() - 1).bit_length()) if counts.max() > 1 else 1


def key_blocks(rows: int, key_bytes: int, stages: int) -> tuple[int, int]:
    """Keys of an attention kernel's block, and how many blocks of K and V it holds at once; `key_bytes`: of one head.
    Keys of at most 256 bytes get what is fastest on an H200; wider ones what fits beside the rows' queries."""
    keys = 64
    if key_bytes <= 256:
        return keys, stages
    while (rows + stages * 2 * keys) * key_bytes > SHARED and (keys, stages) != (16, 1):
        if stages > 2 or keys == 16:  # products take no fewer keys
            stages -= 1
        else:
            keys //= 2
    return keys, stages


def cut_tiles(first: int, rows: int, lane: int) -> list[tuple[int, int, int]]:
    return [(first + at, min(TILE, rows - at), lane) for at in range(0, rows, TILE)]


def image_arrays(
    seen: list[tuple[torch.Tensor, np.ndarray]], rows: int, items_wanted: int, capacity: dict | None
) -> tuple[dict[str, np.ndarray], list[torch.Tensor]]:
    """`seen`: an image's K/V [layers, 2, G, tokens, D] and rows that see it. Rows of one image are gathered, and keys
    are cut where there would be fewer items than fill the device. `capacity` gets the arrays' own added."""
    of_image: dict[int, list] = {}
    for kv, some in seen:
        of_image.setdefault(kv.data_ptr(), [kv]).append(some)
    work = []
    for kv, *several in of_image.values():
        see = np.concatenate(several)
        work += [(kv, see[i : i + TILE]) for i in range(0, len(see), TILE)]
    if not work:
        return {}, []
    if capacity is not None:
        rows = next(iter(capacity.values()))
        capacity |= dict(items=2 * rows + 64, rows=4 * rows + 256, starts=rows + 1, parts=4 * rows + 256)
    cuts = max(1, -(-items_wanted // len(work)))
    items, kvs, item_rows, first = [], [], [], 0
    for kv, some in work:
        tokens = kv.shape[3]
        size = max(1, -(-tokens // cuts // CHUNK)) * CHUNK
        for low in range(0, tokens, size):
            items.append((kv.data_ptr() // kv.element_size(), tokens, low, min(low + size, tokens), first, len(some)))
            kvs.append(kv)
            item_rows.append(some)
            first += len(some)
    of_row = np.concatenate(item_rows)
    parts = np.argsort(of_row, kind="stable")
    starts = np.searchsorted(of_row[parts], np.arange(rows + 1))
    return dict(items=np.array(items), rows=of_row, starts=starts, parts=parts), kvs


def image_places(images: list[torch.Tensor], starts: list[int]) -> dict[str, np.ndarray]:
    """Where each row of concatenated features goes: its position, its image, and the images' addresses and sizes."""
    sizes = np.array([x.shape[3] for x in images])
    first = np.cumsum(sizes) - sizes
    image = np.repeat(np.arange(len(images)), sizes)
    return dict(
        pos=np.array(starts)[image] + np.arange(len(image)) - first[image],
        image=image,
        address=np.array([x.data_ptr() // x.element_size() for x in images]),
        tokens=sizes,
        first=first,
    )


def image_work(tensors: dict[str, torch.Tensor], kvs: list[torch.Tensor], block: int) -> ImageWork | None:
    if "items" not in tensors:
        return None
    return ImageWork(*(tensors[name] for name in ("items", "rows", "starts", "parts")), kvs, block)
