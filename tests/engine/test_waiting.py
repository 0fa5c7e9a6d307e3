"""How the engine waits: for requests to be prepared without taking their time, and for the device while it has more
to do."""

import threading
import time

import pytest
import torch

from tests.builders import tiny_model
from tests.engines import QUESTIONS, all_prepared, alone, assert_idle, request_of, seeing_model, small_engine
from vica.engine import scheduler
from vica.engine.inputs import HEADS, LONGEST_HEAD


@pytest.fixture(scope="module")
def model():
    return tiny_model(t2v_layers=[0, 2])


def short_answers(count: int, tokens: int) -> list:
    return [request_of([3 + n % 4], text=n, max_new_tokens=tokens, ignore_eos=True) for n in range(count)]


def test_many_are_waited_for_at_once(model, monkeypatch):
    """Each is prepared a little after the other; who waits looks at them when the batch is there, or at first."""
    monkeypatch.setattr(scheduler, "PATIENCE", 60)  # however slow the host
    engine, looks = small_engine(model, max_batch=24, workers=1), []
    prepare, ready = engine.inputs.prepare, engine.scheduler._ready
    engine.inputs.prepare = lambda request: (time.sleep(0.001), prepare(request))[1]
    engine.scheduler._ready = lambda: looks.append(None) or ready()
    requests = short_answers(24, 1)
    engine.generate(requests)
    assert [r.result.tokens for r in requests] == [alone(model, r) for r in requests]
    assert len(looks) <= 6


def test_who_is_never_prepared_alone_holds_up_no_batch(model):
    """Some are prepared, one is not: after a moment the others go, and it goes when it is there."""
    engine, released = small_engine(model, max_batch=4), threading.Event()
    prepare = engine.inputs.prepare
    engine.inputs.prepare = lambda request: (request.id == "late" and released.wait(20), prepare(request))[1]
    requests = short_answers(4, 1)
    requests[1].id = "late"
    order = []
    for request in engine.results(requests):
        order.append(request)
        if len(order) == 3:
            released.set()
    assert order[3] is requests[1] and [r.result.tokens for r in order] == [alone(model, r) for r in order]
    assert_idle(engine)


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_next_enter_before_the_last_are_read(model, tokens):
    """Answers so short that nobody runs when the next enter: they are launched behind the pass that is in flight."""
    engine, events = all_prepared(small_engine(model, max_batch=4)), []
    prefill, harvest = engine.runner.prefill, engine.scheduler._harvest
    engine.runner.prefill = lambda rows: events.append("enter") or prefill(rows)
    engine.scheduler._harvest = lambda: events.append("read") or harvest()
    requests = short_answers(8, tokens)
    engine.generate(requests)
    assert [r.result.tokens for r in requests] == [alone(model, r) for r in requests]
    assert events == ["enter", "enter", *["read"] * 2 * tokens]
    assert_idle(engine)


def test_what_is_prepared_late_enters_behind_the_last_pass(model):
    """Two passes are left, and nobody is ready: they are read one by one, and who came meanwhile enters in between."""
    engine, first, events = small_engine(model, max_batch=2), threading.Event(), []
    prepare, harvest, prefill = engine.inputs.prepare, engine.scheduler._harvest, engine.runner.prefill
    engine.inputs.prepare = lambda request: (request.id == "late" and first.wait(20), prepare(request))[1]

    def read():
        events.append("read")
        harvest()
        first.set()
        while not all(s.prepared.done() for s in engine.scheduler.waiting):
            time.sleep(0.001)

    engine.runner.prefill = lambda rows: events.append("enter") or prefill(rows)
    engine.scheduler._harvest = read
    requests = short_answers(4, 2)
    requests[2].id = requests[3].id = "late"
    engine.generate(requests)
    assert [r.result.tokens for r in requests] == [alone(model, r) for r in requests]
    assert events == ["enter", "read", "enter", "read", "read", "read"]


def test_who_is_prepared_between_two_looks_is_noticed(model):
    engine, released = small_engine(model), threading.Event()
    prepare, ready, arrivals = engine.inputs.prepare, engine.scheduler._ready, engine.scheduler.arrivals
    engine.inputs.prepare = lambda request: (released.wait(20), prepare(request))[1]

    def look():
        found, before = ready(), arrivals.count
        if not released.is_set():
            released.set()
            while arrivals.count == before:
                time.sleep(0.001)
        return found

    engine.scheduler._ready = look
    asking = threading.Thread(target=engine.generate, args=(short_answers(1, 1),), daemon=True)
    asking.start()
    asking.join(10)
    assert not asking.is_alive()


def test_few_are_waited_for_after_many(model):
    """Of four two are late, and the last is only prepared when the other late one is answered."""
    engine, gates = small_engine(model), {2: threading.Event(), 3: threading.Event()}
    prepare, answered = engine.inputs.prepare, []
    engine.inputs.prepare = lambda request: (request.id in gates and gates[request.id].wait(10), prepare(request))[1]
    requests = short_answers(4, 1)
    for number, request in enumerate(requests):
        request.id = number
    start = time.perf_counter()
    for request in engine.results(requests):
        answered.append(request.id)
        if len(answered) in gates:
            gates[len(answered)].set()
    assert answered[2:] == [2, 3] and time.perf_counter() - start < 8


def test_nobody_is_waited_for_who_has_no_lane(model, monkeypatch):
    """A batch is ready, others are not: it enters at once."""
    monkeypatch.setattr(scheduler, "PATIENCE", 15)
    engine, entered = small_engine(model), threading.Event()
    prepare, prefill = engine.inputs.prepare, engine.runner.prefill
    engine.inputs.prepare = lambda request: (request.id == "late" and entered.wait(20), prepare(request))[1]
    engine.runner.prefill = lambda rows: entered.set() or prefill(rows)
    requests = short_answers(6, 1)
    requests[4].id = requests[5].id = "late"
    start = time.perf_counter()
    engine.generate(requests)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("tokens", [1, 2])
def test_memory_that_is_short_behind_a_pass_in_flight_lowers_nothing(model, tokens):
    """Nobody runs, so there is nothing to run less of: the request enters when the pass has been read."""
    engine = all_prepared(small_engine(model, max_batch=8, kv_bytes=2**22))
    prefill, sizes, limits = engine.runner.prefill, [], engine.scheduler.limits
    limits.rows, limits.highest = 60, (8, 60)

    def picky(rows):
        sizes.append(len(rows))
        if len(rows[0].layout) == 60 and engine.scheduler.in_flight:
            raise torch.OutOfMemoryError
        return prefill(rows)

    engine.runner.prefill = picky
    large = request_of([60], max_new_tokens=tokens, ignore_eos=True)
    requests = [*short_answers(8, tokens), large, *short_answers(40, tokens)]
    assert not any(result.error for result in engine.generate(requests))
    assert limits.requests == 8 and len(sizes) < 14


def test_beginnings_of_prompts_are_tokenized_once_and_kept_within_bounds():
    model, processor = seeing_model()
    engine, tokenized = small_engine(model, processor=processor), []
    tokenize = processor.tokenize
    processor.tokenize = lambda text, *rest, **more: tokenized.append(text) or tokenize(text, *rest, **more)
    prompts = [f"Look: <image>\n{question}" for question in QUESTIONS]
    assert [engine.inputs._ids(prompt) for prompt in prompts] == [tokenize(prompt) for prompt in prompts]
    assert tokenized.count("Look: ") == 1 and len(tokenized) == len(prompts) + 1
    for number in range(3 * HEADS):
        prompt = f"{number} <image>?"
        assert engine.inputs._ids(prompt) == tokenize(prompt) and len(engine.inputs.heads) <= HEADS
    engine.inputs._ids("long" * LONGEST_HEAD + "<image>")
    assert max(map(len, engine.inputs.heads)) < 10
    private = small_engine(model, processor=processor, keep_prefix=False)
    assert private.inputs._ids(prompts[0]) == tokenize(prompts[0]) and not private.inputs.heads
