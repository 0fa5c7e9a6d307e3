"""The engine waits neither for slow requests nor for the device while it has other work, and wakes once per batch."""

import io
import threading
import time
from concurrent.futures import Future, wait
from types import SimpleNamespace

import pytest
import torch

from tests.builders import tiny_model
from tests.engines import (
    QUESTIONS,
    all_prepared,
    alone,
    answer,
    assert_idle,
    picture,
    request_of,
    seeing_model,
    small_engine,
)  # fmt: skip
from vica.engine import Request, admission
from vica.engine.admission import Arrivals
from vica.engine.inputs import MAX_BEGINNING_LENGTH, MAX_BEGINNINGS


@pytest.fixture(scope="module")
def model():
    return tiny_model(t2v_layers=[0, 2])


@pytest.fixture(scope="module")
def seeing():
    return seeing_model()


def short_answers(count: int, tokens: int) -> list[Request]:
    return [request_of([3 + n % 4], text=n, max_new_tokens=tokens, ignore_eos=True) for n in range(count)]


class SlowFile(io.BytesIO):
    """A picture whose content can be read when `arrived` is set, as from a slow disk."""

    def __init__(self, seed: int):
        content = io.BytesIO()
        picture(seed).save(content, "png")
        super().__init__(content.getvalue())
        self.arrived = threading.Event()

    def read(self, *size):
        assert self.arrived.wait(60)
        return super().read(*size)


def question(images, tokens: int = 1) -> Request:
    return Request.ask("What?", images, max_new_tokens=tokens, ignore_eos=True)


def assert_answer(seeing, request: Request, images) -> None:
    """Asserts that a request has generate's answer about these pictures."""
    model, processor = seeing
    want = answer(model, processor.ask("What?", images), request.max_new_tokens, eos_token_id=None)
    assert request.result.tokens == want


def seen_by_prefills(engine, requests) -> list[tuple[int, bool]]:
    """Returns a list to which each prefill adds how many requests have their result by then, and whether a pass is
    still in flight."""
    prefill, seen = engine.runner.prefill, []

    def watched(prompts):
        answered = sum(request.result is not None for request in requests)
        seen.append((answered, bool(engine.scheduler.flight.passes)))
        return prefill(prompts)

    engine.runner.prefill = watched
    return seen


# --- preparation ---


def test_a_batch_that_becomes_ready_one_by_one_is_looked_at_rarely(model, monkeypatch):
    """Waking for each of 24 requests would take the time that preparing them needs."""
    monkeypatch.setattr(admission, "BATCHING_DELAY", 60)  # however slow the host
    engine, sleeps = small_engine(model, max_batch=24, workers=1), []
    prepare, arrivals = engine.inputs.prepare, engine.scheduler.admission.arrivals
    sleep = arrivals.wait
    engine.inputs.prepare = lambda request: (time.sleep(0.001), prepare(request))[1]
    arrivals.wait = lambda *arguments: (sleeps.append(arguments), sleep(*arguments))[1]
    requests = short_answers(24, 1)
    seen = seen_by_prefills(engine, requests)
    engine.generate(requests)
    assert [r.result.tokens for r in requests] == [alone(model, r) for r in requests]
    assert seen == [(0, False)] and len(sleeps) <= 5


def test_arrivals_wake_a_waiting_thread_once():
    arrivals = Arrivals()
    notify, notified = arrivals.changed.notify, []
    arrivals.changed.notify = lambda: (notified.append(arrivals.count), notify())
    waiting = threading.Thread(target=arrivals.wait, args=(5, None), daemon=True)
    waiting.start()
    while arrivals.wanted != 5:
        time.sleep(0.001)
    for _ in range(4):
        arrivals.add(Future())
    assert waiting.is_alive() and notified == []
    arrivals.add(Future())
    waiting.join(10)
    assert not waiting.is_alive() and notified == [5]
    arrivals.wait(5, None)  # those that have come already are not waited for


def test_slow_preparation_does_not_block_others(seeing):
    """Three of a batch of four are answered while the fourth is still being read; it is answered when it is there."""
    engine = small_engine(seeing[0], processor=seeing[1], max_batch=4, workers=4)
    slow = SlowFile(1)
    sources = [picture(0), slow, picture(2), picture(3)]
    requests = [question([source]) for source in sources]
    order = []
    for request in engine.results(requests):
        order.append(request)
        if len(order) == 3:
            slow.arrived.set()
    assert len(order) == 4 and order[3] is requests[1]
    for n, request in enumerate(requests):
        assert_answer(seeing, request, [picture(n)])
    assert_idle(engine)


def test_a_request_prepared_just_after_a_look_is_noticed(model):
    """The engine sees an unprepared request, and sleeps only after its preparation has ended."""

    class DoneAfterTheFirstLook(Future):
        def __init__(self, work, request):
            super().__init__()
            self.work, self.request = work, request

        def done(self) -> bool:
            if not (found := super().done()):
                self.set_result(self.work(self.request))
            return found

    engine = small_engine(model)
    engine.threads.shutdown()
    engine.threads = SimpleNamespace(submit=DoneAfterTheFirstLook)
    (request,) = requests = short_answers(1, 1)
    asking = threading.Thread(target=engine.generate, args=(requests,), daemon=True)
    asking.start()
    asking.join(20)
    assert not asking.is_alive() and request.result.tokens == alone(model, request)


def test_late_requests_are_answered_one_by_one(seeing):
    """Two of four requests are late, and the last is only read once the other late one is answered."""
    engine = small_engine(seeing[0], processor=seeing[1], workers=4)
    slow = {2: SlowFile(2), 3: SlowFile(3)}
    requests = [question([slow.get(n, picture(n))]) for n in range(4)]
    order, start = [], time.perf_counter()
    for request in engine.results(requests):
        order.append(requests.index(request))
        if len(order) in slow:
            slow[len(order)].arrived.set()
    assert order[2:] == [2, 3] and time.perf_counter() - start < 30
    for n, request in enumerate(requests):
        assert_answer(seeing, request, [picture(n)])


def test_a_full_batch_does_not_wait_for_more(seeing, monkeypatch):
    """Four requests fill the batch, two more are late: the four enter at once."""
    monkeypatch.setattr(admission, "BATCHING_DELAY", 600)
    engine = small_engine(seeing[0], processor=seeing[1], max_batch=4, workers=6)
    slow = [SlowFile(4), SlowFile(5)]
    requests = [question([picture(n)]) for n in range(4)] + [question([file]) for file in slow]
    start = time.perf_counter()
    for _ in engine.results(requests):
        for file in slow:
            file.arrived.set()
    assert time.perf_counter() - start < 300
    for n, request in enumerate(requests):
        assert_answer(seeing, request, [picture(n)])


# --- passes in flight ---


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_next_batch_enters_before_the_last_one_is_read(model, tokens):
    """Answers so short that no request runs when the next batch enters: its prefill is launched behind the pass in
    flight, before any answer of the first batch is there."""
    engine = all_prepared(small_engine(model, max_batch=4))
    requests = short_answers(8, tokens)
    seen = seen_by_prefills(engine, requests)
    engine.generate(requests)
    assert [r.result.tokens for r in requests] == [alone(model, r) for r in requests]
    assert seen == [(0, False), (0, True)]
    assert_idle(engine)


def test_a_late_request_joins_the_next_prefill(seeing, monkeypatch):
    """Two passes are left to read and no other request is ready. The passes are read one by one, and what was prepared
    meanwhile enters before the last is read."""
    monkeypatch.setattr(admission, "BATCHING_DELAY", 60)  # the first two enter together, however slow the host
    engine = small_engine(seeing[0], processor=seeing[1], max_batch=2, workers=4)
    slow = [SlowFile(2), SlowFile(3)]
    requests = [question([picture(n)], tokens=2) for n in range(2)] + [question([file], tokens=2) for file in slow]
    seen = seen_by_prefills(engine, requests)
    for number, _ in enumerate(engine.stream(requests)):
        if number == 0:
            for file in slow:
                file.arrived.set()
            wait([sequence.prepared for sequence in engine.scheduler.admission.waiting], 60)
    assert seen == [(0, False), (0, True)]
    for n, request in enumerate(requests):
        assert_answer(seeing, request, [picture(n)])


@pytest.mark.parametrize("tokens", [1, 2])
def test_short_memory_behind_a_pass_in_flight_lowers_no_limit(model, tokens):
    """No request runs, so fewer could not help: the request enters once the pass has been read."""
    engine = all_prepared(small_engine(model, max_batch=8, kv_bytes=2**22))
    prefill, sizes, limits = engine.runner.prefill, [], engine.scheduler.limits
    limits.tokens, limits.highest = 60, (8, 60)

    def picky(prompts):
        sizes.append(len(prompts))
        if len(prompts[0].layout) == 60 and engine.scheduler.flight.passes:
            raise torch.OutOfMemoryError
        return prefill(prompts)

    engine.runner.prefill = picky
    large = request_of([60], max_new_tokens=tokens, ignore_eos=True)
    requests = [*short_answers(8, tokens), large, *short_answers(40, tokens)]
    assert not any(result.error for result in engine.generate(requests))
    assert limits.requests == 8 and len(sizes) < 14


# --- tokenizing ---


def test_beginnings_of_prompts_are_tokenized_once_and_kept_within_bounds():
    model, processor = seeing_model()
    engine, tokenized = small_engine(model, processor=processor), []
    tokenize = processor.tokenize
    processor.tokenize = lambda text, *rest, **more: tokenized.append(text) or tokenize(text, *rest, **more)
    prompts = [f"Look: <image>\n{question}" for question in QUESTIONS]
    assert [engine.inputs.tokenize(prompt) for prompt in prompts] == [tokenize(prompt) for prompt in prompts]
    assert tokenized.count("Look: ") == 1 and len(tokenized) == len(prompts) + 1
    for number in range(3 * MAX_BEGINNINGS):
        prompt = f"{number} <image>?"
        assert engine.inputs.tokenize(prompt) == tokenize(prompt) and len(engine.inputs.beginnings) <= MAX_BEGINNINGS
    engine.inputs.tokenize("long" * MAX_BEGINNING_LENGTH + "<image>")
    assert max(map(len, engine.inputs.beginnings)) < 10
    private = small_engine(model, processor=processor, keep_prefix=False)
    assert private.inputs.tokenize(prompts[0]) == tokenize(prompts[0]) and not private.inputs.beginnings
