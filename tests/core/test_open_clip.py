"""Towers of open_clip: tiny ones, registered by name, of the three kinds that open_clip wraps."""

import json

import pytest
import torch

import vica
from tests.builders import tiny_model

open_clip = pytest.importorskip("open_clip")

TOWERS = {
    "vica-tiny-clip": (dict(image_size=32, layers=4, width=64, head_width=32, patch_size=8), dict(patch_size=8)),
    "vica-tiny-eva": (  # rotary tables and a class token
        dict(image_size=224, timm_model_name="eva02_tiny_patch14_224", timm_pool="token", timm_proj=None),
        dict(hidden_size=192, num_hidden_layers=12, image_size=224, patch_size=14),
    ),
    "vica-tiny-siglip": (  # pooled by attention, a register but no class token
        dict(image_size=160, timm_model_name="test_vit3", timm_pool="map", timm_proj="none"),
        dict(hidden_size=96, num_hidden_layers=9, image_size=160, patch_size=16),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    for name, (vision, _) in TOWERS.items():
        text = dict(context_length=8, vocab_size=8, width=64, heads=2, layers=1)
        config = dict(embed_dim=64, vision_cfg=vision, text_cfg=text, custom_text=True)
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def model_with(name: str, select_layer: int = -2, **changes) -> vica.ViCAForConditionalGeneration:
    figures = dict(hidden_size=64, num_hidden_layers=4, image_size=32) | TOWERS.get(name, (None, {}))[1]
    select = dict(mm_vision_select_layer=select_layer) | changes.pop("select", {})
    return tiny_model(vision_config=dict(model_type="open_clip_vision", name=name, **figures | changes), **select)


def pixels(model) -> torch.Tensor:
    side = model.config.vision_config.image_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features(model) -> torch.Tensor:
    return model.model.vision_tower(pixels(model))


@pytest.mark.parametrize("select_layer", [-2, -1, 3])
@pytest.mark.parametrize("name", TOWERS)
def test_features_are_the_patches_after_the_block_asked_for(name, select_layer):
    model = model_with(name, select_layer)
    config = model.config.vision_config
    visual = model.model.vision_tower.vision_tower.vision_model.visual
    blocks = visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(output))
    with torch.no_grad():
        visual(pixels(model))  # open_clip's own forward pass, to the end
    whole = list(seen)
    patches = (config.image_size // config.patch_size) ** 2
    after = whole[select_layer - 1 if select_layer > 0 else select_layer]
    assert after.shape[1] == patches + 1
    assert torch.equal(features(model), after[:, 1:])


@pytest.mark.parametrize("name", TOWERS)
def test_saving_and_loading_changes_no_bit(tmp_path, name):
    model = model_with(name)
    model.save_pretrained(tmp_path)
    again, _ = vica.load(tmp_path, device="cpu")
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[k], loaded[k]) for k in saved)
    assert torch.equal(features(again), features(model))
    ids = torch.tensor([[3, 4, vica.IMAGE_TOKEN_INDEX, 5, 6]] * 2)
    with torch.no_grad():
        logits = [x(ids, pixel_values=pixels(x)).logits for x in (model, again)]
    assert torch.equal(*logits)
    half, _ = vica.load(tmp_path, device="cpu", dtype="bfloat16")
    assert torch.equal(features(half), features(model.bfloat16()))


def test_open_clips_own_weights_fit():
    visual = model_with("vica-tiny-eva").model.vision_tower.vision_tower.vision_model.visual
    visual.load_state_dict(open_clip.create_model("vica-tiny-eva").visual.state_dict(), strict=True)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("vica-tiny-clip", dict(num_hidden_layers=5), "vica-tiny-clip has 4 transformer blocks"),
        ("RN50", dict(), "RN50 has 0 transformer blocks"),
        ("vica-nothing", dict(), "open_clip knows no model 'vica-nothing'"),
        ("vica-tiny-clip", dict(select=dict(mm_vision_select_feature="cls_patch")), "cls_patch"),
    ],
)
def test_what_is_not_supported_is_said(name, changes, message):
    with pytest.raises(vica.ViCAError, match=message) as error:
        model_with(name, **changes)
    assert "\n" not in str(error.value)
