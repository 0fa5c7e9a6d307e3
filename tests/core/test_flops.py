"""Counted costs against torch's own counter, against counts by hand, and against published figures."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import vica
from tests.builders import Row, batch, image, tiny_config, tiny_model
from tests.plans import any_plan, fastv, pyramiddrop, shortv, vica_pyramiddrop, visipruner_shallow, vtw
from vica.plan.flops import LayerFlops, attention_flops, causal_pairs, dense, prefill_flops, visual_at, visual_flops
from vica.plan.layer import LayerPlan
from vica.plan.sizes import kv_bytes, visual_tokens
from vica.plan.vica import make_plan

CONFIGS = Path(__file__).parents[2] / "configs"


def linear_flops(model, row: Row) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch([row]))
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))


PLANS = {
    "no layer": make_plan("accel", 4, [], False),
    "ViCA": make_plan("accel", 4, [0, 2], False),
    "all layers": make_plan("accel", 4, [0, 1, 2, 3], False),
    "dense": make_plan("dense", 4, None, False),
    "ShortV": shortv(4, [1, 3]),
    "VTW": vtw(4, 2, "keep"),
    "VisiPruner": visipruner_shallow(4, 2),
    "FastV": fastv(4, 2, 0.5, "round"),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_linear_maps_of_an_image(plan):
    """The same row with a large and a small image differs by what the formula counts, attention aside."""
    model = tiny_model()
    model.config.plan = plan
    measured = linear_flops(model, Row((3, image(50), 4))) - linear_flops(model, Row((3, image(10), 4)))
    counted = visual_flops(model.config, 50, 3) - visual_flops(model.config, 10, 3)
    for layer, large, small in zip(plan, visual_at(plan, 50), visual_at(plan, 10)):
        pairs = 3 * (large - small) + causal_pairs(large) - causal_pairs(small)
        counted -= attention_flops(model.config, pairs) * layer.updates
    assert measured == counted


def by_hand(config, prefix: int, visual: int, text: int) -> tuple[int, int]:
    """Counts a prefill token by token: the linear maps, and the attention of each pair."""
    layer, present, linear, pairs = LayerFlops.of(config), visual, 0, 0
    for plan in config.plan:
        if plan.drop is not None:
            present = plan.drop.count(visual, present)
        tokens = "p" * prefix + "v" * present + "t" * text
        for i, token in enumerate(tokens):
            asks = token == "t" or (plan.prefix_attends or not visual if token == "p" else plan.visual == "update")
            linear += layer.keys_values if token != "v" or plan.updates or plan.reads else 0
            linear += layer.queries_output if asks else 0
            linear += layer.ffn if token != "v" or plan.visual == "update" else 0
            sees = {"p": "p", "v": "pv", "t": "pvt" if plan.text_reads and plan.visual != "skip" else "pt"}[token]
            pairs += sum(key in sees for key in tokens[: i + 1]) if asks else 0
    return linear, attention_flops(config, pairs)


@given(any_plan(4), st.integers(0, 3), st.integers(0, 9), st.integers(1, 4))
def test_a_prefill_of_any_plan_by_hand(plan, prefix, visual, text):
    config = tiny_config()
    config.plan = plan
    linear, attention = by_hand(config, prefix, visual, text)
    counted = prefill_flops(config, prefix, visual, text)
    vocabulary = 2 * config.text_config.hidden_size * config.text_config.vocab_size
    assert (counted.linear - vocabulary, counted.attention) == (linear, attention)


# --- published figures, on LLaVA-1.5-7B and 576 visual tokens ---

L = 32
METHODS = {
    "dense": [LayerPlan()] * L,
    "FastV 50%": fastv(L, 2, 0.5, "round"),
    "FastV 75%": fastv(L, 2, 0.75, "round"),
    "PyramidDrop": pyramiddrop(L, [8, 16, 24], [0.5, 0.25, 0.125]),
    "VTW 15": vtw(L, 15, "keep"),
    "VTW 16": vtw(L, 16, "keep"),
    "ShortV 19": shortv(L, list(range(L - 19, L))),
    "ViCA": make_plan("accel", L, [0, 1, 7, 8, 9, 10, 11, 14], True),
}


def seven_b(method: str) -> vica.ViCAConfig:
    config = vica.ViCAConfig(text_config=dict(num_key_value_heads=32), t2v_layers=[0])
    config.plan = METHODS[method]
    return config


AVERAGES = {"dense": 576, "FastV 50%": 306, "FastV 75%": 171, "PyramidDrop": 270, "VTW 15": 270, "VTW 16": 288,
            "ShortV 19": 576, "ViCA": 576}  # fmt: skip


@pytest.mark.parametrize("method, average", AVERAGES.items())
def test_visual_tokens_present_on_average(method, average):
    assert sum(visual_at(METHODS[method], 576)) / L == average


@pytest.mark.parametrize("method, published", [("dense", 3.82), ("PyramidDrop", 1.78), ("FastV 50%", 2.01)])
def test_visual_flops_as_pyramiddrop_counts(method, published):
    """PyramidDrop's formula calls a multiply-add one FLOP and takes the causal half of attention for whole."""
    config = seven_b(method)
    upper_half = sum(attention_flops(config, n * n - causal_pairs(n)) for n in visual_at(config.plan, 576))
    assert round((visual_flops(config, 576) + upper_half) / 2e12, 2) == published


@pytest.mark.parametrize("method, share", [("ShortV 19", 0.55), ("VTW 16", 0.55), ("FastV 50%", 0.57)])
def test_prefill_flops_as_shortv_counts(method, share):
    """ShortV's formula counts 64 text tokens, and takes the causal half of attention for whole: 2% of the total."""
    full, own = (prefill_flops(seven_b(name), 0, 576, 64).total for name in ("dense", method))
    assert abs(full / 8.5e12 - 1) < 0.02 and abs(own / full - share) < 0.01


def test_the_published_share_of_the_7b_model():
    recipe = json.loads((CONFIGS / "vica-llava-1.5-7b.json").read_text())
    config = vica.ViCAConfig(
        text_config=dict(num_key_value_heads=32),  # LlamaConfig's defaults are the 7B model
        vision_config=dict(image_size=336, patch_size=14, hidden_size=1024, num_attention_heads=16),
        t2v_layers=recipe["t2v_layers"],
    )
    assert visual_tokens(config) == 576
    share = visual_flops(config, 576, 35) / visual_flops(dense(config), 576, 35)
    assert 0.039 < share < 0.043, "about 4%"


HELD = PLANS | {
    "PyramidDrop": pyramiddrop(4, [1, 3], [0.55, 0.25]),
    "ViCA + PyramidDrop": vica_pyramiddrop(4, [0, 2, 3], True, [2, 3], [0.5, 0.25]),
}


@pytest.mark.parametrize("plan", HELD.values(), ids=HELD)
def test_cache_bytes_are_what_the_cache_holds(plan):
    model = tiny_model()
    model.config.plan = plan
    with torch.no_grad():
        cache = model(**batch([Row((3, image(10), 5))]), use_cache=True).past_key_values
    visual, text = kv_bytes(model.config, bytes_each=4, visual=10)
    assert sum(cache.kv_bytes()) == visual + 8 * text


def test_cache_bytes_of_plans_without_drops_grow_by_the_token():
    config = tiny_config(t2v_layers=[0, 2])
    assert kv_bytes(config, visual=10)[0] == 10 * kv_bytes(config)[0]
