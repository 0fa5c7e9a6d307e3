"""Running out of memory costs time but no answer."""

import weakref

import numpy as np
import pytest
import torch

from tests.builders import tiny_model
from tests.engines import alone, assert_idle, request_of, small_engine, watched
from vica.engine import Request, admission, budget, runner
from vica.engine.budget import Limits, out_of_memory
from vica.engine.graphs import Graphs


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def short(engine, name: str, when, error=None) -> list[int]:
    """Lets a pass of the runner fail where `when(number of requests, number of call)`. Returns the sizes tried."""
    work, sizes = getattr(engine.runner, name), []

    def maybe(first, *rest):
        sizes.append(len(first.prompts if name == "decode" else first))
        if when(sizes[-1], len(sizes)):
            raise torch.OutOfMemoryError("CUDA out of memory") if error is None else error()
        return work(first, *rest)

    setattr(engine.runner, name, maybe)
    return sizes


def many() -> list[Request]:
    return [
        request_of([1 + n % 4, ("image", n % 3), 2 + n % 2], n % 2, max_new_tokens=3 + n % 5, ignore_eos=True)
        for n in range(14)
    ]


@pytest.fixture(scope="module")
def many_want(model):
    return [alone(model, request) for request in many()]


@pytest.mark.parametrize("name", ["prefill", "decode", "image_kv"])
@pytest.mark.parametrize("most", [1, 3])
def test_passes_that_are_too_large(model, many_want, name, most):
    engine = watched(small_engine(model, max_batch=8, keep_images=name != "image_kv"))
    sizes = short(engine, name, lambda size, _: size > most)
    for _ in range(2):
        assert [r.tokens for r in engine.generate(many())] == many_want
    assert max(sizes) > most and sum(size > most for size in sizes) < 6, "it learns what fits"
    assert_idle(engine)


@pytest.mark.parametrize("name", ["prefill", "decode", "image_kv"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_memory_that_is_short_once(model, many_want, name, call):
    for max_batch in (1, 8):
        engine = watched(small_engine(model, max_batch=max_batch))
        short(engine, name, lambda _, n: n == call)
        assert [r.tokens for r in engine.generate(many())] == many_want
        assert_idle(engine)


def broken_capture(text: str) -> RuntimeError:
    """Returns what torch raises at the end of a capture in which another error came first."""
    error = torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = RuntimeError(text)
    return error


SHORT = {
    "CUDA": lambda: torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "Triton": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    "a capture": lambda: broken_capture("CUDA driver error: out of memory"),
}


@pytest.mark.parametrize("whose", SHORT)
def test_other_messages_of_short_memory(model, many_want, whose):
    """Captured passes are freed too: no other pass can use their memory."""
    engine = watched(small_engine(model))
    engine.runner.graphs.graphs["decode"] = "captured"
    short(engine, "decode", lambda _, n: n == 2, SHORT[whose])
    assert [r.tokens for r in engine.generate(many())] == many_want
    assert not engine.runner.graphs.graphs


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_failed_pass_holds_no_tensors_when_memory_is_freed(model, name):
    """While the error is handled, it holds the pass's tensors."""
    engine, tensors, gone = small_engine(model), [], []
    work, free = getattr(engine.runner, name), engine.scheduler.recovery.free_memory

    def once(*arguments):
        activations = torch.zeros(3)
        if not tensors:
            tensors.append(weakref.ref(activations))
            raise torch.OutOfMemoryError
        return work(*arguments)

    setattr(engine.runner, name, once)
    engine.scheduler.recovery.free_memory = lambda: gone.append(tensors[0]() is None) or free()
    engine.generate(many()[:2])
    assert gone == [True]


def test_other_errors_are_not_short_memory():
    for error in (ValueError("out of memory"), RuntimeError("device-side assert"), broken_capture("illegal address")):
        assert not out_of_memory(error)
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50)
    assert out_of_memory(found.value)


def test_a_capture_that_fails_is_forgotten(monkeypatch):
    """The next run of its pass is plain again, the one after it is captured."""
    graphs, ran = Graphs(torch.device("cpu"), enabled=True), []

    def run():
        graphs.run(("pass",), dict(x=np.zeros(1)), dict(x=1), lambda _: ran.append("plainly"))

    def fail(*_):
        raise torch.OutOfMemoryError

    class Captured:
        def replay(self):
            ran.append("replayed")

    monkeypatch.setattr(graphs, "_capture", fail)
    run()
    with pytest.raises(torch.OutOfMemoryError):
        run()
    assert not graphs.inputs and not graphs.graphs and graphs.pool is None
    monkeypatch.setattr(graphs, "_capture", lambda *_: (Captured(), None))
    run(), run()
    assert ran == ["plainly", "plainly", "replayed"]


def test_memory_that_is_short_while_tokens_are_drawn(model, monkeypatch):
    """The step has changed the device's state of the batch slots by then; no token may be counted twice."""
    asked = [
        request_of([3, ("image", n % 3), 2], temperature=1.0, top_p=0.9, seed=n, max_new_tokens=9) for n in range(6)
    ]
    want = [r.tokens for r in small_engine(model).generate(asked)]
    for call in (1, 2, 4, 7):
        calls, sample = [], runner.sample

        def once(*arguments, call=call, calls=calls, sample=sample):
            calls.append(1)
            if len(calls) == call:
                raise torch.OutOfMemoryError
            return sample(*arguments)

        monkeypatch.setattr(runner, "sample", once)
        engine = watched(small_engine(model))
        assert [r.tokens for r in engine.generate(asked)] == want
        assert_idle(engine)
        monkeypatch.setattr(runner, "sample", sample)


@pytest.mark.parametrize("name", ["prefill", "decode", "image_kv"])
def test_memory_that_is_never_enough(model, many_want, name):
    """Each fails with the reason; requests that need no such pass are answered."""
    engine = watched(small_engine(model))
    work = getattr(engine.runner, name)
    short(engine, name, lambda size, _: size)
    blind = request_of([4], max_new_tokens=1)
    *results, answered = engine.generate([*many(), blind])
    failed = [r for r in results if r.error]
    assert all(r.finish_reason == "error" and r.error == "out of memory, even alone" for r in failed)
    assert len(failed) == len(results) or (name == "decode" and len(failed) > len(results) / 2)
    assert answered.error == ("out of memory, even alone" if name == "prefill" else None)
    for result, tokens in zip(results, many_want):  # short ones are through before they fail a second time
        assert result.tokens == (tokens[: len(result.tokens)] if result.error else tokens)
    assert_idle(engine)
    setattr(engine.runner, name, work)
    assert [r.tokens for r in engine.generate(many())] == many_want, "and it goes on when there is memory again"


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_limits_grow_back_after_short_memory(model, many_want, monkeypatch, name):
    monkeypatch.setattr(budget, "STEPS_BEFORE_RETRY", 4)
    monkeypatch.setattr(admission, "BATCHING_DELAY", 5)  # all are there when the first enter
    engine = watched(small_engine(model, max_batch=8))
    sizes = short(engine, name, lambda _, n: n <= 2)
    for _ in range(2):
        assert [r.tokens for r in engine.generate(many())] == many_want
    assert sizes[0] == max(sizes[3:]) == engine.scheduler.limits.requests == 8


def test_attempts_that_fail_become_rarer():
    """100 of 256 requests fit; the engine tries more less and less often."""
    limits, failures = Limits(256, 8192), 0
    for _ in range(100_000):
        if limits.requests > 100:
            limits.lower(limits.requests // 2)
            failures += 1
        else:
            limits.record_success()
    assert failures < 20 and limits.tokens == 8192 and limits.requests >= 50


def test_a_large_request_enters_when_others_have_left(model, many_want, monkeypatch):
    """It is not tried again with every token of the others, and it is answered in the end."""
    monkeypatch.setattr(admission, "BATCHING_DELAY", 0)
    engine, beside = watched(small_engine(model, max_batch=8)), []
    prefill = engine.runner.prefill

    def crowded(rows):
        if any(len(row.layout) == 60 for row in rows):
            beside.append(engine.scheduler.running + len(rows) - 1)
            if beside[-1] > 1:
                raise torch.OutOfMemoryError
        return prefill(rows)

    engine.runner.prefill = crowded
    others = [request_of([3], max_new_tokens=9 * n, ignore_eos=True) for n in range(1, 8)]
    large = request_of([60], max_new_tokens=5)
    results = engine.generate([*others, large, *many()])
    assert [r.tokens for r in results[:8]] == [alone(model, r) for r in (*others, large)]
    assert [r.tokens for r in results[8:]] == many_want
    assert beside[-1] <= 1 and len(beside) < 6
    assert_idle(engine)


def test_a_request_that_never_fits_fails_alone(model, many_want):
    """The others are answered; so are streams, whose tokens are given once."""
    engine = watched(small_engine(model))
    prefill = engine.runner.prefill

    def picky(rows):
        if any(40 < len(row.layout) for row in rows):
            raise torch.OutOfMemoryError
        return prefill(rows)

    engine.runner.prefill = picky
    requests, large = many(), request_of([60], max_new_tokens=5)
    requests.insert(3, large)
    got = {}
    for request, token in engine.stream(requests):
        got.setdefault(request, []).append(int(token))
    requests.remove(large)
    assert [got[r] for r in requests] == many_want and large not in got
    assert large.result.error == "out of memory, even alone"
    assert_idle(engine)


def test_streams_go_on_after_memory_was_short(model, many_want):
    """Answers so far are kept, and no token is given twice."""
    engine = watched(small_engine(model, max_batch=5))
    short(engine, "decode", lambda _, n: n % 5 == 2)
    got, requests = {}, many()
    for request, token in engine.stream(requests):
        got.setdefault(request, []).append(int(token))
    assert [got[r] for r in requests] == many_want
    assert_idle(engine)
