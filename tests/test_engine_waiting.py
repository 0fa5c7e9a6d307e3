"""How the engine waits: for requests to be prepared without taking their time, and for the device while it has more
to do."""

import threading
import time

import pytest

from tests.builders import tiny_model
from tests.engines import alone, assert_idle, request_of, small_engine


@pytest.fixture(scope="module")
def model():
    return tiny_model(t2v_layers=[0, 2])


def short_answers(count: int, tokens: int) -> list:
    return [request_of([3 + n % 4], text=n, max_new_tokens=tokens, ignore_eos=True) for n in range(count)]


def test_many_are_waited_for_at_once(model):
    """Each is prepared a little after the other; who waits looks at them when the batch is there, or at first."""
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
    engine, events = small_engine(model, max_batch=4), []
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
