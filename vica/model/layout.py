"""Where every token of a call stands: its row, position and group, images expanded to their visual tokens.

Made once a call on the CPU (numpy), from ids, padding and image sizes alone; every variant lays out its tensors by it.

    input_ids row   pad  sys  sys  <image>        why  ?         one column for each
    tokens               sys  sys  v  v  ...  v   why  ?         E entries; the placeholder becomes n visual tokens
    pos                  0    1    2  3  ...      ...            counted over the expanded row, padding not counted
    group                prefix    visual         text
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..utils.errors import ViCAError


@dataclass
class Tokens:
    """Arrays over the E tokens of a call, row by row in order of position. Visual tokens stand in the order of the
    concatenated image features, because images are given in reading order."""

    row: np.ndarray
    pos: np.ndarray
    column: np.ndarray  # of input_ids
    visual: np.ndarray  # bool
    prefix: np.ndarray  # bool: text before the first image of its row
    batch: int
    columns: int  # width of input_ids

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def text_columns(self) -> np.ndarray:
        """Where the text tokens stand in a flattened [B, T]: sorted, because columns are read in order."""
        text = ~self.visual
        return self.row[text] * self.columns + self.column[text]

    @property
    def source(self) -> np.ndarray:
        """Row of each token in [text; visual], the embeddings of either kind in reading order."""
        source = np.where(self.visual, np.cumsum(self.visual), np.cumsum(~self.visual)) - 1
        return source + self.visual * int((~self.visual).sum())


def expand(
    ids: np.ndarray,
    valid: np.ndarray,
    image_sizes: list[int],
    image_token: int | None,
    start: np.ndarray | None = None,
    seen_image: np.ndarray | None = None,
) -> Tokens:
    """`ids`, `valid`: [B, T]. `start`: the next position of each row; `seen_image`: whether it has had an image.
    `image_token` None: no id is a placeholder."""
    batch, columns = ids.shape
    start = np.zeros(batch, np.int64) if start is None else start
    seen_image = np.zeros(batch, bool) if seen_image is None else seen_image
    row, column = np.nonzero(valid)
    is_image = ids[row, column] == image_token if image_token is not None else np.zeros(len(row), bool)
    check_image_count(int(is_image.sum()), len(image_sizes))

    length = np.ones(len(row), np.int64)
    length[is_image] = image_sizes
    source = np.repeat(np.arange(len(row)), length)
    row, column, visual = row[source], column[source], is_image[source]
    first_of_row = np.searchsorted(row, np.arange(batch))
    pos = np.arange(len(row)) - first_of_row[row] + start[row]
    return Tokens(row, pos, column, visual, _prefix(row, pos, visual, seen_image), batch, columns)


def _prefix(row, pos, visual, seen_image) -> np.ndarray:
    """Tokens before the first image. A row that has no image has no prefix: it is plain Llama."""
    first_image = np.full(len(seen_image), -1)
    rows_with_image, first = np.unique(row[visual], return_index=True)
    first_image[rows_with_image] = pos[visual][first]
    first_image[seen_image] = -1
    return pos < first_image[row]


def check_image_count(placeholders: int, images: int) -> None:
    if placeholders != images:
        raise ViCAError(f"input_ids hold {placeholders} image placeholders, but {images} images were given")


def pad_index(row: np.ndarray, batch: int) -> np.ndarray:
    """[B, S] indices into entries sorted by row, each row's entries to the left; -1 is a hole."""
    count = np.bincount(row, minlength=batch)
    index = np.full((batch, int(count.max(initial=0))), -1)
    rank = np.arange(len(row)) - (np.cumsum(count) - count)[row]
    index[row, rank] = np.arange(len(row))
    return index
