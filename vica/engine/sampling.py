"""Draw the next token from logits. Random numbers depend on a request's seed and position alone, so the same request
draws the same tokens whatever else is in the batch."""

import torch

from ..utils.hashing import scramble


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
) -> torch.Tensor:
    """Returns one token [B] for each row of [B, vocabulary]; every setting has a value for each row.

    Filters are those of transformers: temperature, then top-k (0: all), then top-p. The token is the largest of
    log-probability plus Gumbel noise. `step` is any number that differs between the tokens of a request.
    """
    scores = logits.float() / temperature[:, None]
    if bool((top_k > 0).any()):
        scores = keep_top_k(scores, top_k)
    if bool((top_p < 1).any()):
        scores = keep_top_p(scores, top_p)
    return (scores + gumbel(scores.shape[1], seed, step)).argmax(-1)


def keep_top_k(scores: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Returns the scores, with -inf for all but the `top_k` largest of each row."""
    count = torch.where(top_k > 0, top_k, scores.shape[1]).clamp(max=scores.shape[1]).long()
    least = scores.sort(-1, descending=True).values.gather(1, count[:, None] - 1)
    return scores.masked_fill(scores < least, float("-inf"))


def keep_top_p(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Returns the scores, with -inf outside the smallest set of likeliest tokens whose probability reaches `top_p`."""
    ordered, index = scores.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    # The likeliest always stays. With top_p 1 all stay, even where a rounded sum reaches 1 early.
    out = (before >= top_p[:, None]) & (before > 0) & (top_p < 1)[:, None]
    return scores.masked_fill(out.scatter(1, index, out), float("-inf"))


def gumbel(width: int, seed: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Returns noise [B, width]."""
    state = scramble(scramble(seed) + step)[:, None]
    bits = scramble(state + torch.arange(width, device=seed.device)) & (1 << 52) - 1
    uniform = (bits.double() + 0.5) / (
        1 << 52
    )  # never 0 or 1, and fine-grained near 1, where a vocabulary's winners are
    return -torch.log(-torch.log(uniform)).float()
