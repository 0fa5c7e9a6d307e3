"""Counted costs against torch's own counter, and against the published share."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vica
from tests.builders import Row, batch, image, tiny_model
from vica.plan.flops import dense, visual_flops
from vica.plan.sizes import kv_bytes, visual_tokens

CONFIGS = Path(__file__).parents[2] / "configs"


def linear_flops(model, row: Row) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch([row]))
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("variant", ["accel", "dense"])
@pytest.mark.parametrize("layers", [[], [0, 2], [0, 1, 2, 3]], ids=str)
def test_linear_maps_of_an_image(variant, layers):
    """The same row with and without a large image differs by what the formula counts, attention aside."""
    model = tiny_model(variant=variant, t2v_layers=layers, freeze_prefix=False)
    measured = linear_flops(model, Row((3, image(50), 4))) - linear_flops(model, Row((3, image(1), 4)))
    text = model.config.text_config
    counted = visual_flops(model.config, 50, 3) - visual_flops(model.config, 1, 3)
    if variant == "dense":
        pairs = (50 * 3 + 50 * 51 // 2) - (3 + 1)
        counted -= 4 * pairs * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    assert measured == counted


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


def test_cache_bytes_are_what_the_cache_holds():
    model = tiny_model(t2v_layers=[0, 2])
    with torch.no_grad():
        cache = model(**batch([Row((3, image(10), 5))]), use_cache=True).past_key_values
    visual, text = kv_bytes(model.config, bytes_each=4)
    assert sum(cache.kv_bytes()) == 10 * visual + 8 * text
