"""The one place where attention probabilities are made: rows of a few chosen queries, beside any kernel.

Kernels never return probabilities. What ranks visual tokens, and what studies attention, asks for the rows of one query
a sequence here: a skinny product that costs little beside a layer. All of it is float32, because in half precision
scores near a cut tie and a wrong token stays.
"""

from typing import Protocol

import numpy as np
import torch


def attention_rows(q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Returns the softmax over all keys that each query sees, [B, H, S] in float32.

    `q` [B, H, D] is one query a sequence, `k` [B, S, G, D] its keys (G divides H), `seen` [B, S] the visible ones.
    """
    heads, groups = q.shape[1], k.shape[2]
    q = q.float().view(len(q), groups, heads // groups, -1)
    scores = torch.einsum("bgrd,bsgd->bgrs", q, k.float()).flatten(1, 2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)


class Tap(Protocol):
    """Watches attention layer by layer: it reduces what it sees at once and keeps nothing large."""

    def wants(self, layer: int) -> bool:
        """Returns whether `take` shall be called for this layer."""

    def take(self, layer: int, weights: torch.Tensor, visual: np.ndarray) -> None:
        """Receives the probabilities [B, H, S] of each sequence's last token over all keys that it sees, 0 elsewhere.

        `visual` [B, S] marks the columns of this call's visual tokens that are still there, in order.
        """


def keep_highest(scores: torch.Tensor, index: torch.Tensor, here: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Returns a mask over `index` [B, most] of the `wanted` [B] highest scores of each sequence.

    `scores` [V] belong to a pack of tokens, `index` pads it to rows and `here` [B, most] marks real entries. Of equal
    scores the earlier token stays. Nothing here waits for the device.
    """
    padded = torch.where(here, scores[index], float("-inf"))
    order = padded.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return here & (rank < wanted[:, None])
