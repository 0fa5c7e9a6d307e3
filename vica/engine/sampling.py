"""The next token from logits. Random numbers depend on a request's seed and step alone, so the same request draws the
same tokens whatever else is in the batch."""

import torch

from ..utils.hashing import scramble


def sample(logits: torch.Tensor, temperature, top_k, top_p, seed, step) -> torch.Tensor:
    """[B, vocabulary] and a value of each setting for every row -> [B]. Filters as transformers': temperature, then
    top-k (0: all), then top-p. Drawing is by Gumbel noise: the largest of log-probability plus noise."""
    scores = logits.float() / temperature[:, None]
    if bool((top_k > 0).any()):
        scores = keep_top_k(scores, top_k)
    if bool((top_p < 1).any()):
        scores = keep_top_p(scores, top_p)
    return (scores + gumbel(scores.shape[1], seed, step)).argmax(-1)


def keep_top_k(scores, top_k):
    count = torch.where(top_k > 0, top_k, scores.shape[1]).clamp(max=scores.shape[1]).long()
    least = scores.sort(-1, descending=True).values.gather(1, count[:, None] - 1)
    return scores.masked_fill(scores < least, float("-inf"))


def keep_top_p(scores, top_p):
    """The smallest set of likeliest tokens whose probability reaches top_p."""
    ordered, index = scores.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    # the likeliest always stays; where all may stay, a rounded sum that reaches 1 early must not matter
    out = (before >= top_p[:, None]) & (before > 0) & (top_p < 1)[:, None]
    return scores.masked_fill(out.scatter(1, index, out), float("-inf"))


def gumbel(width: int, seed: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    state = scramble(scramble(seed) + step)[:, None]
    bits = scramble(state + torch.arange(width, device=seed.device)) & (1 << 52) - 1
    uniform = (bits.double() + 0.5) / (1 << 52)  # never 0 or 1, and fine near 1, where the winners of a vocabulary are
    return -torch.log(-torch.log(uniform)).float()
