"""Next-token loss over packed text rows."""

import numpy as np
import torch
import torch.nn.functional as F

from ..utils.errors import ViCAError
from .layout import Tokens

IGNORE = -100


def scored_rows(tokens: Tokens, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Which text tokens, counted in reading order, have a labelled text token right behind them, and its id.
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
    """`logits` [n, vocab] of `targets` [n]. `count`: what the sum is divided by, where a batch is made of several. 0
    where nothing is to be learned, as from a batch whose samples are all broken."""
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    count = len(targets) if count is None else count
    return total / (count.to(total.device).clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))
