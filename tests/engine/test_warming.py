"""Warming up leaves an engine as it was."""

import pytest

from tests.engines import FEATURE, KV, picture, seeing_model, small_engine, watched
from vica.engine import Engine, Request
from vica.testing import build


def test_warming_up_leaves_nothing_behind():
    engine = Engine(*build(), max_batch=2)
    (before,) = engine.generate([Request.ask("What is it?", [picture(1)], max_new_tokens=3)])
    held = set(engine.image_memory.entries)
    assert engine.warm_up([1, 5], text=6) > 0
    assert set(engine.image_memory.entries) == held and held
    (after,) = engine.generate([Request.ask("What is it?", [picture(1)], max_new_tokens=3)])
    assert after.tokens == before.tokens


@pytest.mark.parametrize("window, images", [(24, 6), (20, 6), (19, 0), (16, 0)])
def test_warming_up_within_a_small_window(window, images):
    """An image takes 16 positions, the answer 3 beyond the prompt; where there is no room for it, text is enough."""
    model, processor = seeing_model(text_config=dict(max_position_embeddings=window))
    engine = watched(small_engine(model, processor=processor))
    engine.warm_up([2])
    assert engine.image_memory.misses == images and not engine.image_memory.entries


@pytest.mark.parametrize("variant", ["accel", "dense"])
@pytest.mark.parametrize("room", [0, 1])
def test_warming_up_evicts_no_image(variant, room):
    model, processor = seeing_model(variant=variant)
    size = FEATURE if variant == "dense" else KV + FEATURE
    engine = watched(small_engine(model, processor=processor, image_memory_bytes=(3 + room) * size - 1))
    engine.generate([Request.ask("What?", [picture(n)], max_new_tokens=1) for n in range(2)])
    held, misses = list(engine.image_memory.entries), engine.image_memory.misses
    engine.warm_up([3])
    assert list(engine.image_memory.entries) == held and engine.image_memory.evictions == 0
    assert engine.image_memory.misses == misses + 3 * room
