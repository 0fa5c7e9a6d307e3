"""Lay out one prompt: which tokens are hidden states, their positions, and which of them see each image.

This is `layout.expand` for a single prompt, without the arrays that only a batch needs: the engine prepares thousands
of prompts a second, and `lay_out` takes a hundredth of a millisecond. A test holds the two equal.

    accel   hidden states are text tokens; images are K/V beside them
    dense   hidden states are text and visual tokens; there are no image K/V
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..utils.errors import ViCAError
from .layout import check_image_count

VISUAL = -1  # in place of the id of a hidden state that is a visual token


@dataclass
class Placed:
    """An image: `size` visual tokens from position `start`, seen by the hidden states from `first_seen_by` on."""

    start: int
    size: int
    first_seen_by: int


@dataclass
class PromptLayout:
    """A prompt's hidden states in reading order."""

    ids: np.ndarray  # token ids; VISUAL for visual tokens
    positions: np.ndarray
    images: list[Placed]
    prefix: int  # hidden states before the first image; 0 without an image
    total: int  # positions that the prompt takes, those of visual tokens included

    def __len__(self) -> int:
        return len(self.ids)

    def continued(self, tokens: list[int]) -> "PromptLayout":
        """Returns the prompt followed by the beginning of its answer."""
        ids = np.concatenate([self.ids, np.asarray(tokens, np.int64)])
        positions = np.concatenate([self.positions, np.arange(self.total, self.total + len(tokens))])
        return PromptLayout(ids, positions, self.images, self.prefix, self.total + len(tokens))


def lay_out(
    ids: Sequence[int], sizes: Sequence[int], image_token: int, vocabulary: int, updates_visual: bool
) -> PromptLayout:
    """Returns the layout of a prompt whose images have `sizes` visual tokens.

    `vocabulary`: number of token ids. `updates_visual`: visual tokens are hidden states, as in dense. Raises ViCAError
    for prompts that cannot be answered.
    """
    row = np.asarray(ids, np.int64)
    is_image = row == image_token
    columns = np.nonzero(is_image)[0]
    check_image_count(len(columns), len(sizes))
    _check_ids(row, is_image, vocabulary)
    if any(size < 1 for size in sizes):
        raise ViCAError("an image has no visual tokens")
    length = np.ones(len(row), np.int64)
    length[columns] = sizes
    start = np.cumsum(length) - length  # position of each column's first token
    total, prefix = int(length.sum()), int(columns[0]) if len(columns) else 0
    if updates_visual:
        hidden, positions = np.repeat(np.where(is_image, VISUAL, row), length), np.arange(total)
        first_seen_by = start[columns]
    else:
        hidden, positions = row[~is_image], start[~is_image]
        first_seen_by = columns - np.arange(len(columns))  # columns before the image, without earlier placeholders
    images = [Placed(int(at), size, int(first)) for at, size, first in zip(start[columns], sizes, first_seen_by)]
    return PromptLayout(hidden, positions, images, prefix, total)


def _check_ids(row: np.ndarray, is_image: np.ndarray, vocabulary: int) -> None:
    if not len(row) or is_image[-1]:
        raise ViCAError("the prompt ends with an image (or is empty): an answer needs a text token to follow")
    if (wrong := row[((row < 0) | (row >= vocabulary)) & ~is_image]).size:
        raise ViCAError(f"the prompt holds token {wrong[0]}; the vocabulary has {vocabulary}")
