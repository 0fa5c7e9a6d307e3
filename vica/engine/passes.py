"""Describe the decoder's passes on the host: prompts that run, a prefill of several prompts, a batch that decodes.

A *batch slot* is a running prompt's place in the batch. Its last token, next position and number of text tokens lie on
the device. Batch slot 0 belongs to the padding of captured passes.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from ..kernels.work import ImageArrays, Seen, block_of, cut_tiles, image_arrays
from ..model.prompt import PromptLayout

Sampling = tuple[float, int, float, int]  # temperature, top_k, top_p, seed
Arrays = dict[str, np.ndarray]
Capacity = dict[str, int]  # name of an array: the length that a captured pass reserves

CAPTURED_TOKENS = (16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # sizes of captured prefills


@dataclass(eq=False)
class RunningPrompt:
    """A prompt that has a batch slot and room for its K/V."""

    layout: PromptLayout
    batch_slot: int
    kv_index: np.ndarray  # of all its tokens, those to come included
    shared: int = 0  # leading tokens whose K/V another prompt computes, earlier or in the same pass
    images: list[torch.Tensor] = field(default_factory=list)  # K/V of each; dense: features, which are hidden states
    sampling: Sampling | None = None  # None: greedy


@dataclass(eq=False)
class Piece:
    """Tokens `start` to `end` of a prompt, which stand side by side in a pass."""

    prompt: RunningPrompt
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass
class PrefillPass:
    """The tokens of several prompts in one pass, piece after piece.

    Where some layer freezes system prompts, those that are not shared come first, so that what such a layer computes
    is one slice. Three prompts, of which A and B have an image; A's system prompt is new and B's is shared:

        tokens of the pass    A sys | A text | B text | C text and all
        pieces                   0       1        2        3
        frozen_rows           <----->
        last                               ^        ^        ^
    """

    arrays: Arrays
    images: ImageArrays | None
    features: list[torch.Tensor]  # dense: of all images, in reading order
    frozen_rows: int
    frozen_tiles: int
    block: int  # rows of a tile
    size: int | None  # tokens of the captured pass that this one fits, None where it is too large
    capacity: Capacity | None  # None: run uncaptured

    @classmethod
    def of(
        cls,
        prompts: list[RunningPrompt],
        features: list[torch.Tensor],
        *,
        freezes_prefix: bool,
        reads_images: bool,
        items_wanted: int,
    ) -> "PrefillPass":
        """Returns the pass that computes the prompts. `reads_images`: some layer's text reads images' K/V.
        `items_wanted`: items of attention over images that fill the device."""
        frozen, rest = prefill_pieces(prompts, freezes_prefix)
        pieces = frozen + rest
        first_rows = np.cumsum([0, *map(len, pieces)])
        count, frozen_rows = int(first_rows[-1]), int(first_rows[len(frozen)])
        size = next((n for n in CAPTURED_TOKENS if n >= count), None)
        capacity = prefill_capacity(size) if size is not None and not features and not frozen_rows else None
        seen = seen_images(rest, first_rows[len(frozen) :]) if reads_images else []
        images = image_arrays(seen, count if capacity is None else capacity["ids"], items_wanted)
        arrays = token_arrays(pieces, first_rows) | prompt_arrays(prompts, first_rows[len(frozen) + 1 :])
        if images is not None:
            arrays |= images.arrays
            capacity = None if capacity is None else capacity | ImageArrays.capacity(capacity["ids"])
        frozen_tiles = sum(len(cut_tiles(0, len(piece), 0)) for piece in frozen)
        block = block_of(arrays["tiles"][:, 1])
        return cls(arrays, images, features, frozen_rows, frozen_tiles, block, size, capacity)

    @property
    def image_block(self) -> int:
        return 0 if self.images is None else self.images.block


def system_prompt_apart(prompt: RunningPrompt) -> bool:
    """Whether the pass computes a system prompt that a layer may freeze; without an image a prompt has none."""
    return bool(prompt.layout.images) and prompt.shared == 0 and prompt.layout.prefix > 0


def prefill_pieces(prompts: list[RunningPrompt], freezes_prefix: bool) -> tuple[list[Piece], list[Piece]]:
    """Returns the frozen system prompts, and what else the pass computes of each prompt."""
    apart = [freezes_prefix and system_prompt_apart(p) for p in prompts]
    frozen = [Piece(p, 0, p.layout.prefix) for p, is_apart in zip(prompts, apart) if is_apart]
    rest = [Piece(p, p.layout.prefix if a else p.shared, len(p.layout)) for p, a in zip(prompts, apart)]
    return frozen, rest


def seen_images(pieces: list[Piece], first_rows: np.ndarray) -> list[Seen]:
    """Returns each image's K/V with the rows of the pass that see it. `first_rows`: where each piece begins."""
    return [
        (kv, np.arange(first + image.first_seen_by - piece.start, first + len(piece)))
        for piece, first in zip(pieces, first_rows)
        for image, kv in zip(piece.prompt.layout.images, piece.prompt.images)
    ]


def token_arrays(pieces: list[Piece], first_rows: np.ndarray) -> Arrays:
    """Returns what a pass knows of each of its tokens, and their tiles."""
    return dict(
        ids=np.concatenate([p.prompt.layout.ids[p.start : p.end] for p in pieces]),
        positions=np.concatenate([p.prompt.layout.positions[p.start : p.end] for p in pieces]),
        kv_index=np.concatenate([p.prompt.kv_index[p.start : p.end] for p in pieces]),
        limit=np.concatenate([np.arange(p.start, p.end) for p in pieces]),
        tiles=np.array([t for p, row in zip(pieces, first_rows) for t in cut_tiles(row, len(p), p.prompt.batch_slot)]),
    )


def prompt_arrays(prompts: list[RunningPrompt], ends: np.ndarray) -> Arrays:
    """Returns what a pass knows of each prompt. `ends`: the row behind its last token."""
    return dict(
        last=ends - 1,
        batch_slots=np.array([p.batch_slot for p in prompts]),
        next_position=np.array([p.layout.total for p in prompts]),
        length=np.array([len(p.layout) for p in prompts]),
    )


def prefill_capacity(size: int) -> Capacity:
    """Returns the array lengths of a captured pass of `size` tokens. Prompts shorter than 16 tokens on average run
    uncaptured."""
    of_tokens = dict(ids=size, positions=size, kv_index=size, limit=size, tiles=size // 8 + 2)
    return of_tokens | dict.fromkeys(("last", "batch_slots", "next_position", "length"), size // 16 + 2)


@dataclass(eq=False)
class DecodeBatch:
    """Prompts that decode together until one leaves or enters."""

    prompts: list[RunningPrompt]
    arrays: Arrays
    images: ImageArrays | None
    size: int  # prompts that the pass has room for
    capacity: Capacity | None  # None: run uncaptured

    @classmethod
    def of(cls, prompts: list[RunningPrompt], *, capture: bool, reads_images: bool, items_wanted: int) -> "DecodeBatch":
        count = len(prompts)
        size = captured_batch(count) if capture else count
        capacity = dict(batch_slots=size, tiles=size) if capture else None
        seen = [(kv, np.array([i])) for i, p in enumerate(prompts) for kv in p.images] if reads_images else []
        images = image_arrays(seen, size, items_wanted)
        batch_slots = np.array([p.batch_slot for p in prompts])
        arrays = dict(
            batch_slots=batch_slots, tiles=np.stack([np.arange(count), np.ones(count, np.int64), batch_slots], 1)
        )
        if images is not None:
            arrays |= images.arrays
            capacity = None if capacity is None else capacity | ImageArrays.capacity(size)
        return cls(prompts, arrays, images, size, capacity)

    @property
    def image_block(self) -> int:
        return 0 if self.images is None else self.images.block


def captured_batch(prompts: int) -> int:
    """Returns the size of the captured decode pass for so many prompts: few sizes to capture, close enough to waste
    little."""
    step = 1 if prompts <= 4 else 4 if prompts <= 16 else 8 if prompts <= 32 else 16 if prompts <= 128 else 32
    return -(-prompts // step) * step
