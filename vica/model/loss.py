"""Next-token loss over packed text rows."""

import numpy as np
import torch
import torch.nn.functional as F

from ..utils.errors import ViCAError
from .layout import Tokens

IGNORE = -100


def scored_rows(tokens: Tokens, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns the text tokens, counted in reading order, that a labelled text token follows directly, and its id.
    Placeholders and padding neither predict nor are predicted."""
    if tuple(labels.shape) != (tokens.batch, tokens.columns):
        raise ViCAError(
            f"labels are {list(labels.shape)}; like input_ids they must be {[tokens.batch, tokens.columns]}"
        )
    at = tokens.text_columns
    followed = np.flatnonzero((np.diff(at) == 1) & (at[1:] % tokens.columns != 0))
    targets = labels.cpu().numpy().ravel()[at[followed] + 1]
    return followed[targets != IGNORE], targets[targets != IGNORE]


def mean_loss(logits: torch.Tensor, targets: torch.Tensor, count: torch.Tensor | int | None) -> torch.Tensor:
    """Returns the cross entropy of `logits` [n, vocab] on `targets` [n], divided by `count` (default: n), which covers
    several passes under gradient accumulation. It is 0 where no token has a label, as when all samples are broken."""
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    count = len(targets) if count is None else count
    return total / (count.to(total.device).clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))
