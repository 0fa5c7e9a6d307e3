"""The image memory: an image's tower, projector and K/V are computed once, and kept within a limit."""

import io
import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.engines import (
    FEATURE,
    KV,
    QUESTIONS,
    answer,
    ask,
    assert_idle,
    assert_sound,
    counting,
    features,
    picture,
    request_of,
    seeing_model,
    small_engine,
)  # fmt: skip
from vica.engine import Request, image_store
from vica.engine.image_memory import FEATURES, ImageMemory
from vica.utils import hashing


@pytest.fixture(scope="module")
def seeing():
    return seeing_model()


def test_one_image_and_many_questions(seeing):
    engine = counting(*seeing)
    memory = engine.image_memory
    ask(engine, *((q, [picture()]) for q in QUESTIONS))
    assert (engine.seen, engine.rows, memory.misses, memory.hits) == (1, 16, 1, 4)
    ask(engine, *((q, [picture()]) for q in QUESTIONS))
    assert (engine.seen, engine.rows, memory.misses, memory.hits) == (1, 16, 1, 9)
    assert len(memory) == 1 and memory.bytes == KV + FEATURE and memory.evictions == 0
    assert_idle(engine)


@pytest.mark.parametrize("variant", ["accel", "dense"])
def test_pixels_are_freed_once_features_exist(variant):
    """Also those of requests that found their image computed already."""
    model, processor = seeing_model(variant=variant)
    engine = counting(model, processor, max_batch=5)
    requests = [Request.ask(q, [picture()], max_new_tokens=50, ignore_eos=True) for q in QUESTIONS]
    for _ in engine.stream(requests):
        if engine.scheduler.running == 5:
            running = engine.scheduler.flight.active
            assert all(image.loaded.empty for s in running for image in s.prepared.result().images)
            break
    else:
        raise AssertionError("never all at once")


def test_other_positions_need_no_tower(seeing):
    """K/V stand at a position; features do not."""
    engine = counting(*seeing)
    image, other = picture(0), picture(1)
    ask(engine, ("What?", [image]))
    ask(engine, ("What?", [other, image]), ("What?", [image, other, image]))
    assert engine.seen == 2
    places = sorted(start for _, start in engine.image_memory.entries)
    first = places[2]
    # both at the first place; image second and other second; image third
    assert places == [FEATURES, FEATURES, first, first, first + 17, first + 17, first + 34]
    assert len(engine.image_memory) == 2 and engine.rows == 5 * 16


def test_dense_keeps_features(seeing):
    model, processor = seeing_model(variant="dense")
    engine = counting(model, processor)
    ask(engine, *((q, [picture()]) for q in QUESTIONS), ("Both?", [picture(), picture()]))
    assert engine.seen == 1 and engine.rows == 0 and engine.image_memory.bytes == FEATURE
    assert list(engine.image_memory.entries) == [(next(iter(engine.image_memory.entries))[0], FEATURES)]


@pytest.mark.parametrize("variant", ["accel", "dense"])
def test_nothing_is_kept_when_keeping_is_off(variant):
    engine = counting(*seeing_model(variant=variant), keep_images=False, keep_prefix=False)
    for _ in range(2):
        ask(engine, *((q, [picture()]) for q in QUESTIONS[:4]), max_new_tokens=8)
        assert not engine.image_memory.entries and not engine.runner.pool.prefixes
    assert 2 <= engine.seen <= 8  # those that run at the same time share
    assert_idle(engine)


def test_a_shared_prefix_is_computed_once(seeing):
    """All prompts of a template share its first rows, with a picture or without."""
    engine = counting(*seeing)
    rows = []
    prefill = engine.runner.prefill
    engine.runner.prefill = lambda some: rows.append([(len(r.layout), r.shared) for r in some]) or prefill(some)
    for images in ([picture()], []):
        rows.clear()
        ask(engine, *((q, images) for q in QUESTIONS[:3]))
        ask(engine, *((q, images) for q in QUESTIONS[:3]))
        held = [h for some in rows for _, h in some]
        assert held[0] == 0 and len(set(held[1:])) == 1 and held[1] > 20
    assert len(engine.runner.pool.prefixes) == 2


@pytest.mark.parametrize("variant, rule", [("accel", True), ("accel", 1), ("dense", True)])
def test_prefixes_before_images_and_before_text_are_not_shared(variant, rule):
    """It is frozen, where text alone is plain Llama: rows of the same tokens, but other K/V."""
    model, processor = seeing_model(variant=variant, freeze_prefix=rule)
    engine = counting(model, processor)
    blind, seeing = Request.ask("Yes?", max_new_tokens=6), [*engine.inputs.template_prefix, -200, 300, 301]
    for _ in range(2):
        one, other = engine.generate([blind, Request(seeing, [picture()], 6)])
        assert one.tokens == answer(model, processor.ask("Yes?"), 6)
        pixels = torch.from_numpy(np.stack(processor.process_images([picture()])))
        inputs = dict(input_ids=torch.tensor([seeing]), attention_mask=torch.ones(1, len(seeing)), pixel_values=pixels)
        assert other.tokens == answer(model, inputs, 6)
    assert len(engine.runner.pool.prefixes) == 2


# --- when two sources are the same image ---


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def test_the_same_content_is_one_image(seeing, tmp_path):
    """The same bytes, wherever they lie, are one image; the same pixels are one too."""
    engine = counting(*seeing)
    content = png(picture())
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(content)
    files = [
        tmp_path / "a.png",
        str(tmp_path / "b.png"),
        os.path.relpath(tmp_path / "a.png"),
        content,
        bytearray(content),
    ]
    ask(engine, *(("What?", [source]) for source in files))
    assert len(engine.image_memory) == 1 and engine.seen == 1
    pixels = [picture(), picture().copy(), Image.open(tmp_path / "a.png"), picture().convert("RGBA")]
    ask(engine, *(("What?", [source]) for source in pixels))
    assert len(engine.image_memory) == 2 and engine.seen == 2
    assert_idle(engine)


def test_a_file_that_changes_is_another_image(seeing, tmp_path):
    """Also where size and time stay: a video's frames may follow each other faster than a file's clock ticks."""
    engine = counting(*seeing)
    now = time.time_ns()
    for seed, changed in enumerate((1, 2, now, now)):
        picture(seed).save(tmp_path / "a.bmp")
        os.utime(tmp_path / "a.bmp", ns=(changed, changed))
        ask(engine, ("What?", [tmp_path / "a.bmp"]))
    assert engine.seen == 4


def test_a_file_that_changes_while_it_is_read(seeing, tmp_path):
    """An entry holds the content that its key stands for."""
    engine, path = counting(*seeing), tmp_path / "a.png"
    path.write_bytes(png(picture(1)))
    get = engine.inputs.images.get

    def get_then_change(source):
        content = get(source)
        path.write_bytes(png(picture(2)))
        return content

    engine.inputs.images.get = get_then_change
    ask(engine, ("What?", [path]))
    assert {key for key, _ in engine.image_memory.entries} == {hashing.digest(png(picture(2)))}


def test_a_known_file_is_not_read_again(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"content")
    os.utime(tmp_path / "a", ns=(1, 1))
    first = image_store.digest_file(str(tmp_path / "a"))
    monkeypatch.setattr("builtins.open", None)
    assert image_store.digest_file(str(tmp_path / "a")) == first == hashing.digest(b"content")


def test_the_same_bytes_in_another_palette_or_shape_are_another_image(seeing):
    """Neither with another palette nor in another shape."""
    engine = counting(*seeing)
    gray = picture().convert("L")
    one, other = gray.convert("P"), gray.convert("P")
    other.putpalette([255 - x for x in other.getpalette()])
    assert one.tobytes() == other.tobytes()
    turned = Image.frombytes("RGB", picture().size[::-1], picture().tobytes())
    ask(engine, *(("What?", [image]) for image in (one, other, picture(), turned)))
    assert engine.seen == 4


def test_open_files_and_urls_are_read_once(seeing):
    engine = counting(*seeing)
    request = Request.ask("What?", [io.BytesIO(png(picture()))], max_new_tokens=3)
    (result,) = engine.generate([request])
    assert result.tokens == answer(seeing[0], seeing[1].ask("What?", [picture()]), 3)


def test_changing_given_features_changes_no_stored_ones(seeing):
    """An entry holds the content that its key stands for."""
    for variant in ("accel", "dense"):
        model, _ = seeing_model(variant=variant)
        engine, mine = small_engine(model), features(3).clone()
        ids = request_of([3, ("image", 3), 4]).prompt
        want = engine.generate([Request(ids, [mine], 5)])[0].tokens
        mine *= -1
        engine.generate([Request(ids, [mine], 5)])
        assert engine.generate([Request(ids, [features(3)], 5)])[0].tokens == want
        assert engine.image_memory.misses == 2


def test_a_file_that_cannot_be_opened(seeing, tmp_path, monkeypatch):
    """load_image's own words, not a traceback."""
    picture().save(tmp_path / "a.png")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(image_store, "digest_file", refuse)
    monkeypatch.setattr(Image, "open", refuse)
    (result,) = small_engine(seeing[0], processor=seeing[1]).generate([Request.ask("What?", [tmp_path / "a.png"])])
    assert result.error == f"image {str(tmp_path / 'a.png')!r}: cannot be read ([Errno 13] Permission denied)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_every_value_and_place_counts(dtype, monkeypatch):
    """In a tensor's digest, also where it is made in parts."""
    monkeypatch.setattr(hashing, "CHECKSUM_WORDS", 4)
    x = torch.arange(1, 36).view(5, 7).to(dtype)
    others = [x, x.view(7, 5), x[:4], x.flip(0), torch.zeros_like(x), torch.zeros(5, 8).to(dtype), x.view(torch.uint8)]
    for place in range(35):
        other = x.clone()
        other.view(-1)[place] += 1
        others.append(other)
    digests = [hashing.digest_tensor(other) for other in others]
    same = dtype == torch.uint8  # then the view changes nothing
    assert len(set(digests)) == len(digests) - same and digests[0] == hashing.digest_tensor(x.t().clone().t())
    assert hashing.digest_tensor(x[:0]) != hashing.digest_tensor(x[:0].view(0))


# --- the limit ---


def test_the_least_recently_used_entry_is_evicted_first(seeing):
    engine = counting(*seeing, image_memory_bytes=3 * (KV + FEATURE))
    for seed in (0, 1, 2, 0):
        ask(engine, ("What?", [picture(seed)]))
    assert engine.image_memory.evictions == 0 and engine.seen == 3
    ask(engine, ("What?", [picture(3)]))
    # the features of 0, whose K/V were used just now, and the K/V of 1 were the longest unused
    assert engine.image_memory.evictions == 2 and engine.image_memory.bytes == 3 * (KV + FEATURE)
    ask(engine, ("What?", [picture(0)]), ("What?", [picture(2)]))
    assert engine.seen == 4 and engine.image_memory.evictions == 2
    ask(engine, ("What?", [picture(1)]))
    assert engine.seen == 4, "its features are still there"
    ask(engine, ("What?", [picture(4)]), ("What?", [picture(5)]), ("What?", [picture(6)]))
    assert engine.seen == 7
    assert_idle(engine)


def test_entries_in_use_are_not_evicted(seeing):
    """A stream that has begun keeps its image, while others come and go in what room is left."""
    engine = counting(*seeing, image_memory_bytes=2 * KV)
    first = Request.ask("What?", [picture(0)], max_new_tokens=400, ignore_eos=True)
    stream = engine.stream([first])
    next(stream)
    for seed in range(1, 5):
        ask(engine, ("What?", [picture(seed)]), ("Where?", [picture(seed)]))
        (pinned,) = [e for e in engine.image_memory.entries.values() if e.users]
        assert pinned.bytes == KV
    assert engine.seen == 5
    list(stream)
    assert first.result.tokens == answer(*asked_of(engine, first), 400, eos_token_id=None)
    assert_idle(engine)


def asked_of(engine, request):
    question = request.prompt[0]["content"][-1]["text"]
    return engine.model, engine.processor.ask(question, request.images)


@pytest.mark.parametrize("variant", ["accel", "dense"])
@pytest.mark.parametrize("keep", [True, False])
def test_requests_wait_for_room(variant, keep):
    """Room for one or two images at a time; two images a request among them."""
    model, processor = seeing_model(variant=variant)
    room = 2 * (KV if variant == "accel" else FEATURE)
    engine = counting(model, processor, image_memory_bytes=room, keep_images=keep, max_batch=6)
    pairs = [(QUESTIONS[n % 5], [picture(n % 4)] if n % 3 else [picture(n % 4), picture(n % 2)]) for n in range(14)]
    ask(engine, *pairs)
    assert engine.image_memory.bytes <= room
    assert_idle(engine)


@pytest.mark.parametrize("variant", ["accel", "dense"])
def test_evicted_between_preparation_and_entry(variant, tmp_path):
    """A file whose features are held is not decoded. If they go before it enters, it is; and if the file is gone or
    another, too, that request fails and no other."""
    model, processor = seeing_model(variant=variant)
    engine = counting(model, processor, workers=4)
    for seed, name in enumerate("abc"):
        picture(seed).save(tmp_path / name, "png")
        ask(engine, ("What?", [tmp_path / name]))

    def forget():
        engine.image_memory.clear()
        (tmp_path / "b").unlink()
        picture(5).save(tmp_path / "c", "png")

    prepare, all_prepared = engine.inputs.prepare, threading.Barrier(4, forget)
    engine.inputs.prepare = lambda request: (prepare(request), all_prepared.wait(10))[0]
    sources = [tmp_path / "a", tmp_path / "b", tmp_path / "c", picture(3)]
    first, gone, other, last = engine.generate([Request.ask("What?", [x], max_new_tokens=3) for x in sources])
    assert gone.finish_reason == "error" and str(tmp_path / "b") in gone.error and "no such file" in gone.error
    assert other.error == f"image {str(tmp_path / 'c')!r} has changed while its request waited"
    for result, seed in ((first, 0), (last, 3)):
        assert result.tokens == answer(model, processor.ask("What?", [picture(seed)]), 3)
    assert engine.seen == 5
    assert_idle(engine)


operations = st.lists(
    st.tuples(st.sampled_from(["acquire", "release", "offer", "fill"]), st.integers(0, 5)), min_size=25, max_size=60
)


@settings(max_examples=60)
@given(operations=operations, limit=st.sampled_from([0, 20, 50, 100, 200]), keep=st.booleans())
def test_any_use_of_the_memory(operations, limit, keep):
    """Against the plain meaning: a list in order of use."""
    memory, held = ImageMemory(limit, torch.device("cpu"), dict, keep), []
    order: list[str] = []
    sizes = {str(n): 4 * (3 * n + 1) for n in range(6)}
    for what, n in operations:
        key = str(n)
        if what == "acquire":
            busy = sum(sizes[k] for k in {e.key for e in held} | {key})
            entry = memory.acquire(key, 0, sizes[key])
            assert (entry is None) == (key not in order and busy > limit)
            if entry is None:
                continue
            order = [k for k in order if k != key] + [key]
            held.append(entry)
        elif what == "release" and held:
            entry = held.pop(n % len(held))
            memory.release(entry)
            if (entry.tensor is None or not keep) and entry not in held:
                order.remove(entry.key)
        elif what == "fill" and held:
            entry = held[n % len(held)]
            entry.tensor = torch.zeros(entry.bytes // 4)
        elif what == "offer":
            busy = sum(sizes[k] for k in {e.key for e in held} | {key})
            memory.offer(key, 0, torch.zeros(sizes[key] // 4))
            if keep and key not in order and busy <= limit:
                order.append(key)
        while sum(sizes[k] for k in order) > limit:
            order.remove(next(k for k in order if k not in {e.key for e in held}))
        assert [k for k, _ in memory.entries] == order
        assert memory.bytes == sum(sizes[k] for k in order) <= limit
        assert memory.in_use == sum(sizes[k] for k in {e.key for e in held})


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), min_size=1, max_size=10), st.integers(2, 6)
)
def test_any_use_of_a_tight_memory(seeing, asked, images):
    """No image is ever taken for another, whatever was evicted before."""
    engine = counting(*seeing, image_memory_bytes=images * FEATURE + KV * 2)
    pairs = [(QUESTIONS[q], [picture(n)] + [picture(0)] * twice) for n, q, twice in asked]
    for part in (pairs, pairs[::2], pairs[1::2]):
        ask(engine, *part, max_new_tokens=2)
    assert_sound(engine)
