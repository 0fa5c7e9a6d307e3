"""Streams: tokens and the text they complete as they come, stop strings, and requests that are cancelled or left."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import tiny_model
from tests.engines import alone, answer, assert_idle, picture, request_of, seeing_model, small_engine, watched
from vica.data.processor import ViCAProcessor
from vica.data.tokenizer import load_tokenizer
from vica.engine import Request
from vica.engine.text import TextStream, cut
from vica.testing import VOCABULARY, build_tokenizer
from vica.utils.errors import ViCAError

TEXT = "Yes, naïf漢😀.\nTwo!"


@pytest.fixture(scope="module")
def toy_processor():
    return ViCAProcessor(tokenizer=build_tokenizer())


def scripted(text: str):
    """A model that answers every prompt of the template with that text: the next token depends on the last alone."""
    text_config = dict(vocab_size=VOCABULARY, eos_token_id=2, hidden_size=128)
    model = tiny_model(text_config=text_config)
    processor = ViCAProcessor(tokenizer=build_tokenizer())
    script = [processor.ask("?")["input_ids"][0, -1].item(), *processor.tokenize(text, add_special_tokens=False), 2]
    assert len(set(script)) == len(script), "a token can have only one successor"
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for last, following in zip(script, script[1:]):
            model.lm_head.weight[following] = model.model.embed_tokens.weight[last]
    return model, processor, script[1:]


def streamed(engine, request) -> list:
    """Its tokens; the pieces of text must make the result's."""
    tokens = [token for _, token in engine.stream([request])]
    assert tokens == request.result.tokens
    assert "".join(t.text for t in tokens).strip() == request.result.text
    assert "�" not in request.result.text
    return tokens


def test_streamed_text():
    model, processor, script = scripted(TEXT)
    engine = small_engine(model, processor=processor)
    request = Request.ask("What?", max_new_tokens=60)
    pieces = [t.text for t in streamed(engine, request)]
    assert request.result.tokens == script and request.result.text == TEXT
    assert len(pieces) > len(TEXT.split()) and pieces.count("") >= 6, (
        "a character of several tokens comes with its last"
    )
    assert all(len(piece) < 8 for piece in pieces), "text comes as it is made"
    assert request.result.finish_reason == "stop"


STOPS = {
    "naïf": "Yes,",
    "ï": "Yes, na",
    "漢😀": "Yes, naïf",
    ".\nT": "Yes, naïf漢😀",
    "Y": "",
    "!": "Yes, naïf漢😀.\nTwo",
    "no such thing": TEXT,
    ("Two", "f漢"): "Yes, naï",
    ("o!", "Two! and more"): "Yes, naïf漢😀.\nTw",
    ("😀.\nTwo?", "wo"): "Yes, naïf漢😀.\nT",
}


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_stop_strings(stop):
    """Spread over several tokens, within one, many at a time; text ends before it, tokens as generate's."""
    model, processor, script = scripted(TEXT)
    engine = watched(small_engine(model, processor=processor))
    request = Request.ask("What?", max_new_tokens=60, stop=stop if isinstance(stop, str) else list(stop))
    streamed(engine, request)
    theirs = answer(model, processor.ask("What?"), 60, stop_strings=request.stops, tokenizer=processor.tokenizer)
    assert request.result.tokens == theirs == script[: len(theirs)]
    assert request.result.text == STOPS[stop] and request.result.finish_reason == "stop"
    (again,) = engine.generate([request])
    assert (again.text, again.tokens) == (request.result.text, theirs), "the same without a stream"
    assert_idle(engine)


def test_an_answer_cut_within_a_character_or_a_possible_stop():
    model, processor, script = scripted(TEXT)
    engine = small_engine(model, processor=processor)
    for count in range(1, len(script)):
        request = Request.ask("What?", max_new_tokens=count, stop="naïf漢字")
        tokens = [t for _, t in engine.stream([request])]
        assert tokens == script[:count] and request.result.finish_reason == "length"
        assert "".join(t.text for t in tokens).strip() == request.result.text
        assert request.result.text == processor.decode(script[:count]).strip()


def test_no_stop_strings_without_a_tokenizer():
    engine = small_engine(tiny_model())
    bad, good = engine.generate([request_of([3], stop="x"), request_of([3], max_new_tokens=2)])
    assert "stop strings" in bad.error and len(good.tokens) == 2 and good.text == ""
    tokens = [t for _, t in engine.stream([request_of([3], max_new_tokens=2)])]
    assert tokens == good.tokens and [t.text for t in tokens] == ["", ""]


def pieces_of(processor, tokens, stops) -> tuple[list[str], bool]:
    stream, pieces = TextStream(processor, stops), []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.finish()], stream.stopped


words = st.text(alphabet="ab é漢😀.\n ", max_size=12)
stops = st.lists(st.text(alphabet="ab é漢.\n", min_size=1, max_size=4), max_size=3)


@settings(max_examples=150)
@given(text=words, stops=stops, noise=st.lists(st.integers(0, 399), max_size=4), cut_at=st.integers(0, 30))
def test_any_text(toy_processor, text, stops, noise, cut_at):
    """Pieces make up the decoded text to the first stop string, also of bytes that are no text at all."""
    tokens = (toy_processor.tokenize(text, add_special_tokens=False) + noise)[:cut_at]
    pieces, stopped = pieces_of(toy_processor, tokens, stops)
    whole, found = cut(toy_processor.decode(tokens, skip_special_tokens=True), stops)
    assert "".join(pieces) == whole and stopped == found


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece(folders, legacy):
    """Llama's tokenizer: spaces within tokens, bytes for what it does not know."""
    processor = ViCAProcessor(tokenizer=load_tokenizer(folders[legacy, "llava_llama"]))
    for text in ("Hello there,  two spaces", " leading", "naïf漢字 😀!", "a\n\nb", ""):
        tokens = [*processor.tokenize(text, add_special_tokens=False), processor.tokenizer.eos_token_id]
        whole = processor.decode(tokens, skip_special_tokens=True)
        assert "".join(pieces_of(processor, tokens, [])[0]) == whole
        for stop in ("two", "o t", "é", "字 ", " 😀", "\n"):
            pieces, stopped = pieces_of(processor, tokens, [stop])
            assert ("".join(pieces), stopped) == cut(whole, [stop])


# --- order, leaving, cancelling ---


def asked(count: int = 9, **options) -> list[Request]:
    options = dict(max_new_tokens=8) | options
    return [request_of([1 + n % 4, ("image", n % 3), 2 + n % 2], n % 2, **options) for n in range(count)]


@pytest.fixture(scope="module")
def endless():
    model = tiny_model()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def want(endless):
    """Returns the answers to `asked()`."""
    return [alone(endless, request) for request in asked()]


def assert_good_as_new(engine, want) -> None:
    assert [r.tokens for r in engine.generate(asked())] == want
    assert_idle(engine)


def test_tokens_come_in_order(endless, want):
    engine, requests, got = watched(small_engine(endless)), asked(max_new_tokens=5), {}
    for request, token in engine.stream(iter(requests)):
        got.setdefault(request, []).append(int(token))
        assert (request.result is not None) == (len(got[request]) == 5), "the result is there with the last token"
    assert [got[r] for r in requests] == [tokens[:5] for tokens in want]
    times = [r.result for r in requests]
    assert all(0 <= t.queued_s <= t.first_token_s <= t.total_s for t in times)
    assert_idle(engine)


def test_first_tokens_come_before_last_ones(endless):
    """Tokens are given away as they are made, not at the end; and requests enter as others leave."""
    engine = small_engine(endless, max_batch=2)
    requests = [request_of([3], max_new_tokens=n) for n in (2, 60, 2, 2, 2)]
    order = [requests.index(request) for request, _ in engine.stream(requests)]
    ends = [len(order) - order[::-1].index(n) for n in range(5)]
    assert ends[0] < ends[1] and ends[2] < ends[1] and ends[3] < ends[1]


def test_cancelled(endless, want):
    """One that runs, one that waits, and later one that runs; which ones depends on the order of preparation."""
    engine, requests = watched(small_engine(endless, max_batch=3)), asked()
    cancelled = []
    for number, (request, _) in enumerate(engine.stream(requests)):
        if number == 3:
            cancelled = [request, engine.scheduler.admission.waiting[-1].request]
        if number == 8:
            cancelled.append(request)
        if number in (3, 8):
            for one in cancelled:
                engine.cancel(one)
    running, waiting, _ = cancelled
    for request, all_tokens in zip(requests, want):
        result = request.result
        if request in cancelled and result.finish_reason == "cancelled":
            assert result.error is None and result.tokens == all_tokens[: len(result.tokens)] and len(result.tokens) < 8
        else:
            assert result.tokens == all_tokens and request not in (running, waiting)
    assert waiting.result.tokens == [] and waiting.result.first_token_s is None and running.result.tokens
    assert_idle(engine)
    assert_good_as_new(engine, want)


def test_cancelled_before_its_turn(endless, want):
    """Whether the engine has drawn it or not. Asked again it is answered; when it has its result, it is too late."""
    engine, requests = watched(small_engine(endless, max_batch=1)), asked()
    for n, _ in enumerate(engine.stream(iter(requests))):
        if n == 0:
            engine.cancel(requests[8])
    assert (requests[8].result.finish_reason, requests[8].result.tokens) == ("cancelled", [])
    assert [r.result.tokens for r in requests[:8]] == want[:8]
    engine.cancel(requests[0])
    assert [r.tokens for r in engine.generate(requests)] == want
    assert_idle(engine)


@pytest.mark.parametrize("after", [1, 2, 7, 30])
@pytest.mark.parametrize("how", ["break", "close", "raise", "source", "delete"])
def test_a_stream_that_is_left(endless, want, how, after):
    engine, requests, taken = watched(small_engine(endless, max_batch=3)), asked(), []

    def source():
        for n, request in enumerate(requests):
            if how == "source" and n == after:
                raise RuntimeError("left")
            taken.append(request)
            yield request

    stream = engine.stream(source())
    try:
        for n, _ in enumerate(stream):
            if n + 1 == after and how == "break":
                break
            if n + 1 == after and how == "close":
                stream.close()
            if n + 1 == after and how == "raise":
                raise RuntimeError("left")
            if n + 1 == after and how == "delete":
                break
    except RuntimeError as error:
        assert str(error) == "left"
        del error
    stream.close() if how == "break" else None
    del stream
    gc.collect()
    for request, all_tokens in zip(requests, want):
        assert (request.result is not None) == (request in taken)
        if request in taken:
            assert request.result.tokens == all_tokens[: len(request.result.tokens)]
            assert request.result.finish_reason == ("length" if request.result.tokens == all_tokens else "cancelled")
    assert_idle(engine)
    assert_good_as_new(engine, want)


def test_leaving_one_stream_leaves_the_other_alone(endless, want):
    engine, mine, others = watched(small_engine(endless, max_batch=4)), asked(), asked()
    left, kept = engine.stream(mine), engine.stream(others)
    for _ in range(3):
        next(left), next(kept)
    left.close()
    list(kept)
    assert [r.result.tokens for r in others] == want
    assert any(r.result is None or r.result.finish_reason == "cancelled" for r in mine)
    assert_idle(engine)


def once_within(owner, name: str, do) -> None:
    """Calls `do` the next time that this method is called, in its place in a step."""
    method = getattr(owner, name)

    def do_first(*arguments):
        setattr(owner, name, method)
        do()
        return method(*arguments)

    setattr(owner, name, do_first)


def in_a_thread(work) -> None:
    with ThreadPoolExecutor(1) as other:
        other.submit(work).result()


def test_two_threads_at_the_same_time(endless, want):
    """The second gets an error, and the first goes on. Threads may take turns, also with one stream."""
    engine, stream = watched(small_engine(endless)), None

    def intrude():
        for use in (lambda: engine.generate(asked(2)), lambda: list(stream)):
            with pytest.raises(ViCAError, match="two threads use this engine at the same time"):
                use()

    requests = asked()
    stream = engine.stream(requests)
    in_a_thread(lambda: next(stream))
    next(stream)
    once_within(engine.runner, "decode", lambda: in_a_thread(intrude))
    assert_good_as_new(engine, want)
    in_a_thread(lambda: assert_good_as_new(engine, want))


@pytest.mark.parametrize("run", [in_a_thread, lambda work: work()], ids=["in another thread", "by the collector"])
def test_a_stream_closed_during_a_step(endless, want, run):
    engine, left = watched(small_engine(endless)), asked()
    stream = engine.stream(left)
    next(stream)
    once_within(engine.runner.pool, "take", lambda: run(stream.close))
    assert_good_as_new(engine, want)


def test_a_source_that_asks_the_engine(endless, want):
    engine = watched(small_engine(endless))

    def source():
        for request in asked():
            engine.generate(asked(1))
            yield request

    assert [r.tokens for r in engine.generate(source())] == want
    requests = {}
    for request, token in engine.stream(source()):
        requests.setdefault(request, []).append(token)
    assert sorted(requests.values()) == sorted(want)
    assert_idle(engine)


def test_an_object_that_is_no_request_is_refused(endless):
    engine = small_engine(endless)
    with pytest.raises(ViCAError, match="a request is a vica.engine.Request, got str"):
        engine.generate([*asked(2), "What is this?"])
    assert_idle(engine)


def test_an_engine_is_freed_with_its_last_reference(endless, want):
    """With its K/V, at once, without Python's collector; and its threads end."""
    gc.collect()
    before = threading.active_count()
    gc.disable()
    engine = small_engine(endless)
    assert_good_as_new(engine, want)
    pool, memory = weakref.ref(engine.runner.pool), weakref.ref(engine.image_memory)
    del engine
    gone = pool() is None and memory() is None
    gc.enable()
    assert gone
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_nothing_keeps_a_request_alive():
    model, processor = seeing_model()
    engine = small_engine(model, processor=processor)
    request = Request.ask("What?", [picture()], max_new_tokens=3)
    (result,) = engine.generate([request])
    alive, images = weakref.ref(request), weakref.ref(request.images[0])
    gc.disable()
    del request, result
    gone = alive() is None and images() is None
    gc.enable()
    assert gone, "at once: pictures are large, and Python's collector may come late"
