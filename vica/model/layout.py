"""Where each token of a call stands: its sequence, order and group, with every image expanded to its visual tokens.

Computed once a call on the host (numpy) from ids, padding and image sizes alone; every flow arranges its tensors by it.

    input_ids           pad  sys  sys  <image>        why  ?         one column each
    tokens                   sys  sys  v  v  ...  v   why  ?         E entries; a placeholder becomes n visual tokens
    pos                      0    1    2  3  ...      ...            index in the expanded sequence, padding left out
    group                    prefix    visual         text
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..utils.errors import ViCAError


@dataclass
class Tokens:
    """Arrays over the E tokens of a call, sequence after sequence, each in order of `pos`. Visual tokens come in the
    order of the concatenated image features, because images are given in reading order.

    `pos` also tells causality: a token attends to tokens of its sequence with a `pos` no larger than its own, in
    every layer, whatever was dropped or renumbered in between.
    """

    row: np.ndarray  # sequence of the batch
    pos: np.ndarray
    column: np.ndarray  # of input_ids
    visual: np.ndarray  # bool
    prefix: np.ndarray  # bool: text before the first image of its sequence
    batch: int
    columns: int  # width of input_ids

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def text_columns(self) -> np.ndarray:
        """Index of each text token in a flattened [B, T]; sorted, because columns are read in order."""
        text = ~self.visual
        return self.row[text] * self.columns + self.column[text]

    @cached_property
    def visual_counts(self) -> np.ndarray:
        """Visual tokens of each sequence, [B]."""
        return np.bincount(self.row[self.visual], minlength=self.batch)

    @cached_property
    def counts(self) -> np.ndarray:
        """Tokens of each sequence, [B]."""
        return np.bincount(self.row, minlength=self.batch)

    def select(self, index: np.ndarray) -> "Tokens":
        """Returns the tokens at `index`, a sorted index or a mask."""
        names = ("row", "pos", "column", "visual", "prefix")
        return replace(self, **{name: getattr(self, name)[index] for name in names})


def expand(
    ids: np.ndarray,
    valid: np.ndarray,
    image_sizes: list[int],
    image_token: int | None,
    start: np.ndarray | None = None,
    seen_image: np.ndarray | None = None,
) -> Tokens:
    """Returns the tokens of `ids` [B, T] where `valid` [B, T]. `start`: the next position of each sequence;
    `seen_image`: whether it has had an image. `image_token` None: no id is a placeholder."""
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


def _prefix(row: np.ndarray, pos: np.ndarray, visual: np.ndarray, seen_image: np.ndarray) -> np.ndarray:
    """Returns a mask of the tokens before their sequence's first image. A sequence without image has no prefix: it is
    plain Llama."""
    first_image = np.full(len(seen_image), -1)
    rows_with_image, first = np.unique(row[visual], return_index=True)
    first_image[rows_with_image] = pos[visual][first]
    first_image[seen_image] = -1
    return pos < first_image[row]


def check_image_count(placeholders: int, images: int) -> None:
    if placeholders != images:
        raise ViCAError(f"input_ids hold {placeholders} image placeholders, but {images} images were given")


def ranks_in_row(row: np.ndarray, batch: int) -> np.ndarray:
    """Returns each entry's index among the entries of its own row; `row` is sorted."""
    count = np.bincount(row, minlength=batch)
    return np.arange(len(row)) - (np.cumsum(count) - count)[row]


def pad_index(row: np.ndarray, batch: int) -> np.ndarray:
    """Returns [B, S] indices into entries sorted by row, each row's entries to the left; -1 is a hole."""
    count = np.bincount(row, minlength=batch)
    index = np.full((batch, int(count.max(initial=0))), -1)
    index[row, ranks_in_row(row, batch)] = np.arange(len(row))
    return index


def last_text_tokens(tokens: Tokens) -> np.ndarray:
    """Returns each sequence's last token, [B]; -1 where that is no text or the sequence is empty."""
    last = np.searchsorted(tokens.row, np.arange(tokens.batch), side="right") - 1
    if not len(tokens):
        return np.full(tokens.batch, -1)
    dead = (last < 0) | (tokens.row[last] != np.arange(tokens.batch)) | tokens.visual[last]
    return np.where(dead, -1, last)
