"""Shared parts of the engine's tests: small engines, requests, the model's own answers, and checks of an engine's
state."""

from concurrent.futures import wait

import numpy as np
import torch
from PIL import Image

from tests.builders import IMAGE, VOCAB, WIDTH, tiny_model, tiny_vision
from vica.data.processor import ViCAProcessor
from vica.engine import Engine, Request
from vica.engine.sequence import Sequence, State
from vica.testing import VOCABULARY, build_tokenizer

SIZES = (1, 3, 6, 10)  # visual tokens of the images in `features`
QUESTIONS = ["What is this?", "Is there a star?", "How many?", "Which colour is the circle?", "Where?"]
KV, FEATURE = 16 * 2 * 2 * 8 * 2 * 4, 16 * 32 * 4  # bytes of a picture's K/V and of its features


def features(which: int) -> torch.Tensor:
    """Returns the same tensor each time for a number."""
    return torch.randn(SIZES[which % len(SIZES)], WIDTH, generator=torch.Generator().manual_seed(which))


def words(which: int, count: int) -> list[int]:
    """Returns the beginning of an endless text, one for each number."""
    return torch.randint(3, VOCAB, (600,), generator=torch.Generator().manual_seed(which)).tolist()[:count]


def request_of(parts, text: int = 0, **options) -> Request:
    """Returns a request of `parts`: an int is that many tokens of the text, ("image", n) is `features(n)`."""
    ids, images, text = [], [], iter(words(text, 600))
    for part in parts:
        if isinstance(part, int):
            ids += [next(text) for _ in range(part)]
        else:
            ids.append(IMAGE)
            images.append(features(part[1]))
    return Request(ids, images, **options)


def alone(model, request: Request, **options) -> list[int]:
    """Returns the tokens that `model.generate` gives for a request of token ids and features."""
    ids = torch.tensor([request.prompt])
    if request.ignore_eos:
        options["eos_token_id"] = None
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        image_features=request.images or None,
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return out[0, ids.shape[1] :].tolist()


def answer(model, inputs, max_new_tokens: int, **options) -> list[int]:
    """Returns the tokens that `model.generate` gives for a processor's inputs."""
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=3, **options)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def small_engine(model, **options) -> Engine:
    return Engine(model, **(dict(kv_bytes=2**20, image_memory_bytes=2**20, max_batch=4, workers=2) | options))


def all_prepared(engine: Engine) -> Engine:
    """Returns the engine, which now lets requests enter only when all that wait are prepared, however slow the host."""
    admission = engine.scheduler.admission
    choose = admission.choose
    admission.choose = lambda *state: (wait([s.prepared for s in admission.waiting]), choose(*state))[1]
    return engine


def seeing_model(**changes):
    """Returns a tiny model with tower, tokenizer and processor: pictures of 28 pixels become 16 visual tokens."""
    text = dict(vocab_size=VOCABULARY, eos_token_id=2, bos_token_id=1, pad_token_id=3) | changes.pop("text_config", {})
    model = tiny_model(text_config=text, **(dict(vision_config=tiny_vision()) | changes))
    return model, ViCAProcessor.from_config(model.config, build_tokenizer())


def picture(seed: int = 0, size=(40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def assert_sound(engine: Engine) -> None:
    """Checks what holds after every step: each K/V index and batch slot is in one place, each sequence is where its
    state says, and no limit is passed."""
    admission, flight = engine.scheduler.admission, engine.scheduler.flight
    pool, memory = engine.runner.pool, engine.image_memory
    running: list[Sequence] = flight.active
    assert {s.state for s in admission.waiting} <= {State.WAITING} and {s.state for s in running} <= {State.RUNNING}
    assert {s.state for s in flight.draining} <= {State.DRAINING}
    batch_slots = [*admission.free_batch_slots, *(s.prompt.batch_slot for s in running)]
    assert sorted(batch_slots) == list(range(1, engine.max_batch + 1))
    indices = [pool.free_indices, *(p.kv_index for p in pool.prefixes.values()), *(s.own_kv for s in running)]
    assert sorted(np.concatenate(indices).tolist()) == list(range(1, pool.size + 1))
    for prefix in pool.prefixes.values():
        assert prefix.users == sum(s.prefix is prefix for s in running)
    held = [e for s in running for e in s.entries]
    for entry in memory.entries.values():
        assert entry.users == held.count(entry)
        assert entry.tensor is None or entry.tensor.numel() * entry.tensor.element_size() == entry.bytes
    assert memory.bytes == sum(e.bytes for e in memory.entries.values()) <= memory.limit
    assert memory.in_use == sum(e.bytes for e in memory.entries.values() if e.users)


def assert_idle(engine: Engine) -> None:
    """Checks that nothing is left of any request."""
    assert not engine.scheduler.busy and engine.scheduler.flight.batch is None
    assert_sound(engine)


def watched(engine: Engine, after=assert_sound) -> Engine:
    """Returns the engine, checked after every step."""
    step = engine.scheduler.step

    def checked():
        step()
        after(engine)

    engine.scheduler.step = checked
    return engine


def counting(model, processor, **options) -> Engine:
    """Returns an engine whose `seen` counts the pictures that the tower saw, and `rows` the visual tokens that became
    K/V."""
    engine = watched(small_engine(model, processor=processor, **options))
    engine.seen, engine.rows = 0, 0
    encode, image_kv = engine.runner.encode, engine.runner.image_kv

    def counted_encode(pixels):
        engine.seen += len(pixels)
        return encode(pixels)

    def counted_kv(images, starts):
        engine.rows += sum(map(len, images))
        return image_kv(images, starts) if images else []

    engine.runner.encode, engine.runner.image_kv = counted_encode, counted_kv
    return engine


def ask(engine, *pairs, **options) -> None:
    """Asks (question, images) pairs at once, and checks each answer against generate's."""
    options = dict(max_new_tokens=3) | options
    results = engine.generate([Request.ask(question, images, **options) for question, images in pairs])
    for result, (question, images) in zip(results, pairs):
        want = answer(engine.model, engine.processor.ask(question, images), options["max_new_tokens"])
        assert result.error is None and result.tokens == want
