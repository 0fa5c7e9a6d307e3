"""Sampling: transformers' filters, the right frequencies, and the same tokens for a seed whatever else runs."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.builders import tiny_model
from tests.engines import alone, assert_idle, request_of, small_engine
from vica.engine import Request, sampling

WHERE = list(itertools.product([0.3, 1.0, 1.7], [0, 1, 5, 97, 500], [1e-60, 1e-12, 0.1, 0.5, 0.9, 0.999, 1.0]))


def settings_of(rows):
    """Columns as the runner gives them."""
    return torch.tensor(rows, dtype=torch.float32).unbind(1)


def allowed(logits, temperature, top_k, top_p) -> torch.Tensor:
    """Which tokens transformers leaves."""
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
def test_filters_are_those_of_transformers(ties):
    """All settings at once, each row by its own."""
    logits = 3 * torch.randn(len(WHERE), 97, generator=torch.Generator().manual_seed(0))
    logits = logits.round() if ties else logits
    temperature, top_k, top_p = settings_of(WHERE)
    scores = logits / temperature[:, None]
    scores = sampling.keep_top_p(sampling.keep_top_k(scores, top_k), top_p)
    for row, where in enumerate(WHERE):
        want = allowed(logits[row : row + 1], *where)[0]
        if ties and where[2] < 1:  # which of equal tokens stay is left to the order of the sort
            assert torch.equal(scores[row].sort().values, want.sort().values), where
        else:
            assert torch.equal(scores[row], want), where


@pytest.mark.parametrize("name", ["keep_top_k", "keep_top_p"])
def test_a_row_without_a_filter_is_not_touched_by_others(name):
    """Its probabilities may sum to more than 1 in float32 before the last."""
    logits = torch.randn(400, 5000, generator=torch.Generator().manual_seed(0))
    value = torch.zeros(400) if name == "keep_top_k" else torch.ones(400)
    value[0] = 3 if name == "keep_top_k" else 0.3
    filtered = getattr(sampling, name)(logits, value)
    assert torch.equal(filtered[1:], logits[1:]) and not torch.equal(filtered[0], logits[0])


def draw(logits, rows: int, seed, step, setting=(1.0, 0, 1.0)):
    columns = settings_of([setting] * rows)
    seed, step = (torch.as_tensor(x).expand(rows).long() for x in (seed, step))
    return sampling.sample(logits.expand(rows, -1), *columns, seed, step)


PROBABILITIES = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005])
SETTINGS = {  # the probabilities that the filters leave
    (1.0, 0, 1.0): PROBABILITIES,
    (2.0, 0, 1.0): PROBABILITIES**0.5,
    (1.0, 3, 1.0): PROBABILITIES * (torch.arange(8) < 3),
    (1.0, 0, 0.7): PROBABILITIES * (torch.arange(8) < 3),
    (0.5, 5, 0.9): PROBABILITIES**2 * (torch.arange(8) < 3),
}


def distance(counts: torch.Tensor, want: torch.Tensor) -> float:
    """Chi-square per degree of freedom; nothing may be drawn that has no probability."""
    assert not counts[want == 0].any()
    counts, want = counts[want > 0], counts.sum() * want[want > 0] / want.sum()
    return float(((counts - want) ** 2 / want).sum() / (len(want) - 1))


@pytest.mark.parametrize("varied", ["seed", "step"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_frequencies(setting, varied):
    many = torch.arange(40_000)
    seed, step = (many, 7) if varied == "seed" else (7, many)
    drawn = draw(PROBABILITIES.log(), len(many), seed, step, setting)
    assert distance(torch.bincount(drawn, minlength=8).double(), SETTINGS[setting]) < 3


def test_steps_and_tokens_are_independent():
    """A draw says nothing of the next one, nor of what the next seed draws then, before or after."""
    many = torch.arange(40_000)
    for pair in (dict(seed=many, step=8), *(dict(seed=many + 1, step=step) for step in (6, 7, 8))):
        one, other = draw(torch.zeros(8), len(many), many, 7), draw(torch.zeros(8), len(many), **pair)
        counts = torch.bincount(8 * one + other, minlength=64).double()
        assert ((counts - 625) ** 2 / 625).sum() / 63 < 2


def test_noise_is_finite_at_its_ends(monkeypatch):
    """Infinite noise would draw a token against all probability, or one that was filtered out."""
    for bits in (0, -1):
        monkeypatch.setattr(sampling, "scramble", lambda x, bits=bits: torch.full_like(x, bits))
        noise = sampling.gumbel(5, torch.tensor([1]), torch.tensor([1]))
        assert noise.shape == (1, 5) and noise.isfinite().all()


HOT = dict(temperature=1.5, max_new_tokens=8, ignore_eos=True)


def mixed(count: int = 12) -> list[Request]:
    """Greedy and sampled requests of all kinds, each with its seed."""
    ways = [dict(), dict(top_k=5), dict(top_p=0.8), dict(top_k=20, top_p=0.9), dict(temperature=0.0)]
    return [
        request_of([1 + n % 5, ("image", n % 3), 2 + n % 3], n % 2, **(HOT | dict(seed=100 + n) | ways[n % 5]))
        for n in range(count)
    ]


def tokens_of(engine, requests) -> list[list[int]]:
    results = engine.generate(requests)
    assert not any(r.error for r in results)
    return [r.tokens for r in results]


def test_a_seed_gives_the_same_tokens_in_any_batch():
    model = tiny_model()
    model.generation_config.eos_token_id = None
    want = [tokens_of(small_engine(model, max_batch=1), [request])[0] for request in mixed()]
    assert len({tuple(x) for x in want}) == len(want)
    for max_batch, order in ((4, 1), (4, -1), (12, 1), (3, -1)):
        engine = small_engine(model, max_batch=max_batch)
        assert tokens_of(engine, mixed()[::order])[::order] == want
        assert tokens_of(engine, mixed()[::order])[::order] == want, "with prefixes and images kept"
        assert_idle(engine)
    greedy = [r for r in mixed() if not r.temperature]
    assert [want[i] for i, r in enumerate(mixed()) if not r.temperature] == [alone(model, r) for r in greedy]


def test_different_seeds_differ():
    model = tiny_model()
    engine = small_engine(model, max_batch=8)
    asked = [request_of([4, ("image", 1), 3], **HOT, seed=seed) for seed in range(20)]
    assert len({tuple(x) for x in tokens_of(engine, asked)}) == 20
    unseeded = [request_of([4, ("image", 1), 3], **HOT) for _ in range(5)]
    assert len({tuple(x) for x in tokens_of(engine, unseeded + unseeded)}) == 10


def test_filters_that_leave_one_token_are_greedy():
    model = tiny_model()
    want = alone(model, request_of([4, ("image", 1), 3], max_new_tokens=8, ignore_eos=True))
    engine = small_engine(model)
    for cold in (
        dict(top_k=1),
        dict(top_p=1e-9),
        dict(temperature=1e-5),
        dict(temperature=1e-300),
        dict(seed=2**63 - 1, top_k=1),
    ):
        request = request_of([4, ("image", 1), 3], **(HOT | cold))
        assert tokens_of(engine, [request]) == [want], cold
    assert len(tokens_of(engine, [request_of([4], **(HOT | dict(top_k=10**400, temperature=1e6)))])[0]) == 8


def test_settings_as_numpy_numbers():
    """Small integers must not overflow in the sums that the engine makes with them."""
    given = dict(max_new_tokens=np.uint8(9), temperature=np.float32(0.5), top_p=np.float64(0.9), top_k=np.int8(5))
    plain = {name: value.item() for name, value in given.items()}
    engine = small_engine(tiny_model())
    one, other = (request_of([280], seed=seed, **x) for seed, x in ((np.uint64(7), given), (7, plain)))
    assert tokens_of(engine, [one]) == tokens_of(engine, [other])


@settings(max_examples=25)
@given(order=st.permutations(range(8)), max_batch=st.integers(1, 8), first=st.integers(1, 7))
def test_a_seed_gives_the_same_tokens_in_any_order(order, max_batch, first):
    """Also when some arrive while others run."""
    model = tiny_model()
    asked = mixed(8)
    want = tokens_of(small_engine(model, max_batch=1), asked)
    engine = small_engine(model, max_batch=max_batch)
    early, late = [asked[i] for i in order[:first]], [asked[i] for i in order[first:]]
    for n, _ in enumerate(stream := engine.stream(early)):
        if n == 3:
            tokens_of(engine, late)
    del stream
    assert [r.result.tokens for r in asked] == want
