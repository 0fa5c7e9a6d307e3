"""One prompt as the engine computes it: which tokens are hidden rows, where they stand, which images they see.

accel: text tokens are rows, and images are K/V beside them. dense: visual tokens are rows too; there is no image K/V.
"""

from dataclasses import dataclass

import numpy as np

from ..model.layout import check_image_count
from ..plan.layer import LayerPlan
from ..utils.errors import ViCAError

VISUAL = -1  # in place of a row's token id


@dataclass
class Placed:
    """An image of the prompt: `size` visual tokens from position `start`, seen by the rows from `first_row` on."""

    start: int
    size: int
    first_row: int


@dataclass
class Layout:
    ids: np.ndarray  # [rows]; VISUAL where a row is a visual token
    pos: np.ndarray  # [rows]
    images: list[Placed]
    prefix: int  # rows before the first image
    total: int  # positions taken, visual tokens included

    def __len__(self) -> int:
        return len(self.ids)

    def continued(self, tokens: list[int]) -> "Layout":
        """The prompt with the beginning of its answer."""
        ids = np.concatenate([self.ids, np.asarray(tokens, np.int64)])
        pos = np.concatenate([self.pos, np.arange(self.total, self.total + len(tokens))])
        return Layout(ids, pos, self.images, self.prefix, self.total + len(tokens))


def lay_out(ids: list[int], sizes: list[int], image_token: int, plan: list[LayerPlan], vocabulary: int) -> Layout:
    """What model/tokens.py lays out for a whole batch, for one prompt and at a hundredth of a millisecond."""
    row = np.asarray(ids, np.int64)
    is_image = row == image_token
    columns = np.nonzero(is_image)[0]
    check_image_count(len(columns), len(sizes))
    if not len(row) or is_image[-1]:
        raise ViCAError("the prompt ends with an image (or is empty): an answer needs a text token to follow")
    if (wrong := row[((row < 0) | (row >= vocabulary)) & ~is_image]).size:
        raise ViCAError(f"the prompt holds token {wrong[0]}; the vocabulary has {vocabulary}")
    if any(size < 1 for size in sizes):
        raise ViCAError("an image has no visual tokens")
    length = np.ones(len(row), np.int64)
    length[columns] = sizes
    pos = np.cumsum(length) - length  # of each column's first token
    total, prefix = int(length.sum()), int(columns[0]) if len(columns) else 0
    if plan[0].updates:
        rows, at, first_rows = np.repeat(np.where(is_image, VISUAL, row), length), np.arange(total), pos[columns]
    else:
        rows, at, first_rows = row[~is_image], pos[~is_image], columns - np.arange(len(columns))
    images = [Placed(int(start), size, int(first)) for start, size, first in zip(pos[columns], sizes, first_rows)]
    return Layout(rows, at, images, prefix, total)
