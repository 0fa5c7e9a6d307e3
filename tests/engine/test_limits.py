"""A wrong request fails alone, a waiting one gets its turn, and nothing grows."""

import gc
import io
import re
import threading
import weakref

import pytest
import torch
from PIL import Image

from tests.builders import IMAGE, tiny_model
from tests.engines import (
    all_prepared,
    alone,
    answer,
    assert_idle,
    features,
    picture,
    request_of,
    seeing_model,
    small_engine,
    watched,
    words,
)  # fmt: skip
from vica.engine import Engine, Request
from vica.utils.errors import ViCAError

GOOD = [[3, ("image", 1), 4], [5], [4, ("image", 0), ("image", 1), 2]]


def good() -> list[Request]:
    return [request_of(parts, max_new_tokens=4, ignore_eos=True) for parts in GOOD]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def want(model):
    """Returns the answers to `good()`."""
    return [alone(model, request) for request in good()]


def assert_alone(engine, bad: list[Request], want) -> list[str]:
    """Bad requests among good ones, which are answered; the errors of the bad ones."""
    few = good()
    mixed = [request for pair in zip(bad, few * len(bad)) for request in pair] + few
    results = engine.generate(mixed)
    errors = []
    for request, result in zip(mixed, results):
        if request in bad:
            assert result.finish_reason == "error" and result.tokens == [] and result.text == ""
            assert result.error and "\n" not in result.error and len(result.error) < 350
            errors.append(result.error)
        else:
            assert result.error is None and result.tokens == want[few.index(request)]
    assert_idle(engine)
    return errors


def wrong(prompt=(5, 6), images=(), max_new_tokens=9, **options) -> Request:
    return Request(list(prompt) if isinstance(prompt, tuple) else prompt, list(images), max_new_tokens, **options)


WRONG = {
    "no image for a place": (wrong((5, IMAGE, 6)), "1 places for images, but 0 were given"),
    "too few images": (wrong((5, IMAGE, 6, IMAGE, 7), [features(0)]), "2 places for images, but 1 were given"),
    "too many images": (wrong((5, 6), [features(0)]), "0 places for images, but 1 were given"),
    "empty prompt": (wrong(()), "the prompt is empty"),
    "ends with an image": (wrong((5, IMAGE), [features(0)]), "ends with an image"),
    "only an image": (wrong((IMAGE,), [features(0)]), "ends with an image"),
    "a token too high": (wrong((5, 97)), "the prompt holds token 97; the vocabulary has 97"),
    "a token too low": (wrong((5, -3)), "the prompt holds token -3"),
    "a text without a processor": (wrong("hello"), "no processor: give prompts as token ids"),
    "messages without a processor": (wrong([{"role": "user", "content": "hello"}]), "no processor"),
    "a number": (wrong(7), "no processor|a prompt is a text, chat messages or token ids, got int"),
    "narrow features": (wrong((5, IMAGE, 6), [torch.zeros(3, 31)]), r"\[3, 31\]; they must be floats \[tokens, 32\]"),
    "empty features": (wrong((5, IMAGE, 6), [torch.zeros(0, 32)]), r"\[0, 32\]"),
    "whole numbers as features": (wrong((5, IMAGE, 6), [torch.zeros(3, 32, dtype=torch.long)]), "must be floats"),
    "NaN": (wrong((5, IMAGE, 6), [torch.full((3, 32), torch.nan)]), "NaN or infinity"),
    "a picture without a tower": (wrong((5, IMAGE, 6), [picture()]), "no vision tower"),
    "too long": (wrong(words(0, 513)), "takes 513 positions, the model has 512"),
    "too long with its image": (wrong((*words(0, 3), IMAGE, 5), [torch.zeros(510, 32)]), "takes 514 positions"),
    "too many rows": (wrong(words(0, 150), max_new_tokens=200), "may take 349 rows of text K/V, kv_bytes is room"),
    "an image too large": (wrong((5, IMAGE, 6), [torch.zeros(50, 32)]), "take 12800 bytes, image_memory_bytes is 12"),
    "images too large": (wrong((5, IMAGE, 6, IMAGE, 6), [torch.ones(24, 32)] * 2), "take 12288 bytes"),
    "no tokens asked for": (wrong(max_new_tokens=0), "max_new_tokens is 0; it must be a whole number from 1"),
    "True tokens": (wrong(max_new_tokens=True), "max_new_tokens is True"),
    "True as seed": (wrong(temperature=1.0, seed=True), "seed is True"),
    "half a token": (wrong(max_new_tokens=1.5), "max_new_tokens is 1.5"),
    "negative temperature": (wrong(temperature=-0.5), "temperature is -0.5; it must be a number from 0"),
    "NaN as temperature": (wrong(temperature=float("nan")), "temperature is nan"),
    "a word as temperature": (wrong(temperature="hot"), "temperature is 'hot'"),
    "an endless temperature": (wrong(temperature=10**400), "temperature is 1000"),
    "top_p 0": (wrong(temperature=1.0, top_p=0.0), "top_p is 0.0; it must be above 0 and at most 1"),
    "top_p 1.1": (wrong(temperature=1.0, top_p=1.1), "top_p is 1.1"),
    "top_k -1": (wrong(temperature=1.0, top_k=-1), "top_k is -1"),
    "a seed too large": (wrong(temperature=1.0, seed=2**64), "seed is 18446744073709551616; it must be a whole number"),
    "a seed too small": (wrong(temperature=1.0, seed=-1), "seed is -1"),
    "an empty stop": (wrong(stop=""), "stop is ''; it must be one or more non-empty strings"),
    "a number to stop": (wrong(stop=5), "stop is 5"),
    "numbers to stop": (wrong(stop=[5]), r"stop is \[5\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_request_fails_alone(model, want, name):
    request, reason = WRONG[name]
    engine = watched(small_engine(model, kv_bytes=512 * 300, image_memory_bytes=12000))
    (error,) = assert_alone(engine, [request], want)
    assert re.search(reason, error), error


def test_all_wrong_requests_at_once(model, want):
    engine = watched(small_engine(model, kv_bytes=512 * 300, image_memory_bytes=12000, max_batch=3))
    bad = [request for request, _ in WRONG.values()]
    assert len(set(assert_alone(engine, bad, want))) > 25
    few = good()
    assert {request for request, _ in engine.stream([*bad, *few])} == set(few)
    assert all(r.result.finish_reason == "error" for r in bad)
    assert [r.result.tokens for r in few] == want


def test_pictures_that_cannot_be_read(tmp_path):
    model, processor = seeing_model()
    engine = watched(small_engine(model, processor=processor))
    content = io.BytesIO()
    picture(0, (300, 200)).save(content, "jpeg")
    (tmp_path / "half.jpg").write_bytes(content.getvalue()[:2000])
    (tmp_path / "text.jpg").write_text("no picture")
    bad = [
        (tmp_path / "missing.jpg", "missing.jpg': no such file"),
        (str(tmp_path / "half.jpg"), "half.jpg': cannot be read"),
        (tmp_path / "text.jpg", "text.jpg': not an image in a format that Pillow reads"),
        (tmp_path, "is a directory"),
        (b"none at all", "image of 11 bytes: not an image"),
        ("http://127.0.0.1:9/a.png", "cannot be downloaded"),
        ("data:image/png;base64,AAAA", "not an image"),
        (7, "image of type int"),
        (torch.zeros(3, 28, 28), "uint8"),
        (Image.open(tmp_path / "half.jpg"), "cannot be read"),
    ]
    many = [Request.ask("What?", [source], max_new_tokens=3) for source, _ in bad]
    many += [Request.ask("What?", [picture(n)], max_new_tokens=3) for n in range(3)]
    many += [Request("<image> What?", [picture(), picture()])]
    many += [Request([{"role": "user", "content": [{"type": "image"}]}])]
    many += [Request([{"role": "user", "content": [{"type": "image", "image": picture()}]}], [picture()])]
    results = engine.generate(many)
    for result, (_, reason) in zip(results, bad):
        assert reason in result.error and "\n" not in result.error
    for n, result in enumerate(results[len(bad) : len(bad) + 3]):
        assert result.tokens == answer(model, processor.ask("What?", [picture(n)]), 3)
    marks, places, both = (r.error for r in results[-3:])
    assert "1 places for images, but 2 were given" in marks and "1 places for images, but 0 were given" in places
    assert "not in both" in both
    assert_idle(engine)


def test_files_of_the_same_content_fail_by_their_own_names(tmp_path):
    """Two files of the same content are one image, but each is read on its own, and errors name the right one."""
    model, processor = seeing_model()
    engine = watched(small_engine(model, processor=processor, workers=1))
    for name in ("good-a", "good-b"):
        picture().save(tmp_path / name, "png")
    for name in ("bad-a", "bad-b"):
        (tmp_path / name).write_text("no picture")
    get = engine.inputs.images.get

    def get_then_lose(source):
        content = get(source)
        if source.name == "good-a":
            source.unlink()
        return content

    engine.inputs.images.get = get_then_lose
    names = ["good-a", "good-b", "bad-a", "bad-b"]
    lost, kept, *bad = engine.generate([Request.ask("What?", [tmp_path / x], max_new_tokens=3) for x in names])
    assert "good-a': no such file" in lost.error and kept.error is None
    assert ["bad-a': not an image" in bad[0].error, "bad-b': not an image" in bad[1].error] == [True, True]
    assert_idle(engine)


def test_missing_t2v_layers_fail_requests_with_images():
    model = tiny_model(t2v_layers=None)
    seeing, blind = small_engine(model).generate([request_of([3, ("image", 1), 2]), request_of([3], max_new_tokens=2)])
    assert "needs t2v_layers" in seeing.error and len(blind.tokens) == 2


def test_an_unexpected_error_fails_one_request(model, want, monkeypatch, caplog):
    """An exception that is no ViCAError is a bug: the log gets it, and the others are answered."""
    engine = watched(small_engine(model))
    prepare = engine.inputs.prepare

    def surprise(request):
        if request.id == "surprise":
            raise KeyError("what is this")
        return prepare(request)

    engine.inputs.prepare = surprise
    assert "what is this" in assert_alone(engine, [request_of([3], id="surprise")], want)[0]
    assert "a request failed while it was prepared" in caplog.text


def test_an_error_of_the_device_ends_the_call_and_nothing_else(model, want):
    """Such an error names no request. The engine takes everything back and can be asked again."""
    for name in ("prefill", "decode", "image_kv"):
        engine = watched(small_engine(model, max_batch=2))
        work = getattr(engine.runner, name)

        def fail(*_):
            raise RuntimeError("device-side assert")

        setattr(engine.runner, name, fail)
        with pytest.raises(RuntimeError, match="device-side assert"):
            engine.generate(good())
        assert_idle(engine)
        setattr(engine.runner, name, work)
        assert [r.tokens for r in engine.generate(good())] == want


def test_nan_does_not_spread_to_other_requests(model):
    """NaN in one request's K/V must not reach requests that get its K/V indices later, or run beside it."""
    broken = tiny_model()
    broken.generation_config.eos_token_id = None
    with torch.no_grad():
        broken.model.embed_tokens.weight[1] = torch.nan
    engine = small_engine(broken, max_batch=2, kv_bytes=512 * 80, keep_prefix=False)
    for _ in range(3):
        engine.generate([Request([1] * 30, max_new_tokens=20), request_of([3, ("image", 2), 4], max_new_tokens=20)])
        few = [request_of([3, ("image", 1), 20], max_new_tokens=4), request_of([3, ("image", 2), 4], max_new_tokens=20)]
        assert [r.tokens for r in engine.generate(few)] == [alone(broken, r) for r in few]


# --- waiting ---


def test_a_slow_request_delays_no_other(model, want):
    """While one request is still being prepared, the others are answered."""
    engine, answered = small_engine(model), threading.Event()
    prepare = engine.inputs.prepare
    engine.inputs.prepare = lambda request: (request.id == "slow" and answered.wait(20), prepare(request))[1]
    slow = request_of([4], max_new_tokens=3, id="slow")
    order = []
    for request, _ in engine.stream([slow, *good()]):
        order.append(request)
        if len(order) == 12:
            answered.set()
    assert answered.is_set() and slow not in order[:12] and slow in order
    assert slow.result.tokens == alone(model, slow)


def test_another_kind_of_model():
    with pytest.raises(ViCAError, match="the engine runs a ViCAForConditionalGeneration, not a Linear"):
        Engine(torch.nn.Linear(2, 2))


def test_a_large_request_waits_for_room_and_gets_it(model):
    """One that needs the whole pool runs when the others have left, and is not overtaken for ever."""
    engine = watched(small_engine(model, kv_bytes=512 * 60, max_batch=5))
    small = [request_of([2 + n % 5], max_new_tokens=6, ignore_eos=True) for n in range(30)]
    large = request_of([50], max_new_tokens=11, ignore_eos=True)
    requests = [*small[:10], large, *small[10:]]
    ended = []
    for request, _ in engine.stream(iter(requests)):
        if request.result is not None:
            ended.append(request)
    assert large.result.tokens == alone(model, large)
    assert ended.index(large) < 20
    assert_idle(engine)


def test_idle_prefixes_are_evicted_for_requests(model):
    """Prefixes stay as long as there is room, and never keep a request out."""
    engine = watched(small_engine(model, kv_bytes=512 * 100))
    for text in range(12):
        requests = [request_of([30 + text % 3, ("image", n), 3], text, max_new_tokens=3) for n in range(3)]
        assert [r.tokens for r in engine.generate(requests)] == [alone(model, r) for r in requests]
    assert 1 <= len(engine.runner.pool.prefixes) <= 3
    whole = request_of([98], max_new_tokens=3)
    assert engine.generate([whole])[0].tokens == alone(model, whole)
    assert not engine.runner.pool.prefixes
    assert_idle(engine)


def test_prefixes_in_use_are_not_evicted(model):
    """Evicts the idle one of an older prefix in use and a younger idle one."""
    engine = all_prepared(watched(small_engine(model, kv_bytes=512 * 140)))
    long = request_of([30, ("image", 1), 3], 0, max_new_tokens=60, ignore_eos=True)  # outlasts the others
    stream = engine.stream([long])
    next(stream)
    for last in (request_of([20, ("image", 1), 3], 1, max_new_tokens=2), request_of([40], 2, max_new_tokens=2)):
        assert engine.generate([last])[0].tokens == alone(model, last)
    list(stream)
    assert long.result.tokens == alone(model, long)
    assert [len(p.kv_index) for p in engine.runner.pool.prefixes.values()] == [30]


# --- nothing grows ---


def test_two_thousand_requests_leave_nothing_behind(model):
    """Requests of every kind come from a generator: few are prepared ahead, and each is freed once it is answered."""
    engine = small_engine(model, max_batch=16, kv_bytes=2**18, image_memory_bytes=2**14)
    alive = weakref.WeakSet()
    given = most_ahead = most_alive = 0

    def lazily(count: int):
        nonlocal given, most_alive
        for n in range(count):
            parts = [1 + n % 5, ("image", n % 40), 2] if n % 3 else [4 + n % 7]
            request = request_of(parts, n % 11, max_new_tokens=1 + n % 3, temperature=n % 2, top_k=5, seed=n)
            if n % 50 == 7:
                request.prompt.append(500)  # fails
            if n % 50 == 9:
                request.prompt = [5] * 400  # finds no room
            alive.add(request)
            given, most_alive = given + 1, max(most_alive, len(alive))
            yield request

    def run(count: int) -> int:
        """Returns the number of Python's objects, tensors among them, that exist afterwards."""
        nonlocal most_ahead
        for n, (request, _) in enumerate(engine.stream(lazily(count))):
            most_ahead = max(most_ahead, engine.scheduler.waiting)
            if n % 97 == 0:
                engine.cancel(request)
        del request
        gc.collect()
        return len(gc.get_objects())

    before = run(300)
    grown = run(1700) - before
    assert given == 2000 and most_ahead <= 32 and most_alive < 100
    assert not alive and not len(engine.inputs.images)
    assert grown < 200
    assert_idle(engine)


def test_an_interrupt_while_requests_enter_loses_nothing(monkeypatch):
    """The first has its batch slot already when the second's turn is interrupted."""
    model = tiny_model()
    engine = small_engine(model)
    hold = engine.scheduler.admission.hold_content

    def interrupted(image):
        if interrupted.turns == 1:
            raise KeyboardInterrupt
        interrupted.turns += 1
        return hold(image)

    interrupted.turns = 0
    monkeypatch.setattr(engine.scheduler.admission, "hold_content", interrupted)
    asked = [request_of([3, ("image", n), 4], max_new_tokens=3) for n in (1, 2)]
    with pytest.raises(KeyboardInterrupt):
        engine.generate(asked)
    assert [r.result.finish_reason for r in asked] == ["cancelled"] * 2
    assert_idle(engine)
