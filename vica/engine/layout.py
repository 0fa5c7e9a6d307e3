"""One prompt as the engine computes it: which tokens are hidden rows, where they stand, which images they see.

accel: text tokens are rows, and images are K/V beside them. dense: visual tokens are rows too; there is no image K/V.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import ViCAError
from ..model.plan import LayerPlan
from ..model.tokens import expand

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
    row = np.asarray(ids, np.int64)
    tokens = expand(row[None], np.ones((1, len(row)), bool), sizes, image_token)
    text = row[row != image_token]
    if not len(text) or row[-1] == image_token:
        raise ViCAError("the prompt ends with an image (or is empty): an answer needs a text token to follow")
    if (wrong := text[(text < 0) | (text >= vocabulary)]).size:
        raise ViCAError(f"the prompt holds token {wrong[0]}; the vocabulary has {vocabulary}")
    if any(size < 1 for size in sizes):
        raise ViCAError("an image has no visual tokens")
    live = ~tokens.visual | plan[0].visual_updated
    token_ids = np.where(tokens.visual, VISUAL, row[tokens.column])
    first = np.nonzero(np.diff(np.r_[-1, np.where(tokens.visual, tokens.column, -1)]) > 0)[0]
    before = np.cumsum(live) - live  # rows before each token
    images = [Placed(int(at), size, int(before[at])) for at, size in zip(first, sizes)]
    return Layout(token_ids[live], tokens.pos[live], images, int(tokens.prefix.sum()), len(tokens))
