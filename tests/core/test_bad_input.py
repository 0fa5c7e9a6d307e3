"""What a caller gets wrong is answered in one line that names the value."""

import pytest
import torch

import vica
from tests.builders import IMAGE, WIDTH, tiny_config, tiny_model, tiny_vision


@pytest.fixture(scope="module")
def model():
    return tiny_model(vision_config=tiny_vision())


def features(*sizes, width=WIDTH):
    return [torch.zeros(n, width) for n in sizes]


@pytest.mark.parametrize("variant", ["accel", "mask", "dense"])
@pytest.mark.parametrize(
    "ids, given, message",
    [
        ([5, IMAGE, 6, IMAGE], features(3), "hold 2 image placeholders, but 1 images"),
        ([5, 6], features(3), "hold 0 image placeholders, but 1 images"),
        ([5, IMAGE], None, "hold 1 image placeholders, but 0 images"),
        ([5, IMAGE, 6], features(3, width=7), r"image_features\[0\] is \[3, 7\]; it must be \[tokens, 32\]"),
        ([5, IMAGE, 6], [torch.zeros(2, 3, WIDTH)], r"image_features\[0\] is \[2, 3, 32\]"),
        ([5, 97], None, "hold 97; ids are 0 to 96"),
        ([5, -100], None, "hold -100"),
    ],
)
def test_ids_and_features(model, variant, ids, given, message):
    model.set_variant(variant)
    with pytest.raises(vica.ViCAError, match=message) as error:
        model(torch.tensor([ids]), image_features=given)
    assert "\n" not in str(error.value)


def test_pixels(model):
    ids = torch.tensor([[5, IMAGE, 6]])
    with pytest.raises(vica.ViCAError, match=r"pixel_values are \[1, 3, 30, 30\]; this tower takes \[N, 3, 28, 28\]"):
        model(ids, pixel_values=torch.zeros(1, 3, 30, 30))
    with pytest.raises(vica.ViCAError, match="not both"):
        model(ids, pixel_values=torch.zeros(1, 3, 28, 28), image_features=features(3))
    with pytest.raises(vica.ViCAError, match="no vision tower"):
        tiny_model()(ids, pixel_values=torch.zeros(1, 3, 28, 28))


def test_generate_drops_no_image(model):
    with pytest.raises(vica.ViCAError, match="hold 0 image placeholders, but 2 images"):
        model.generate(torch.tensor([[5, 6]]), image_features=features(3, 3), max_new_tokens=1)


def test_features_without_tokens(model):
    with pytest.raises(vica.ViCAError, match=r"image_features\[0\] is \[0, 32\]"):
        model(torch.tensor([[5, IMAGE, 6]]), image_features=features(0))


def test_labels_of_another_shape(model):
    with pytest.raises(vica.ViCAError, match=r"labels are \[1, 2\]; like input_ids they must be \[1, 4\]"):
        model(torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6]]))


@pytest.mark.parametrize("name", ["inputs_embeds", "position_ids", "output_attentions"])
def test_what_forward_does_not_take_is_not_swallowed(model, name):
    with pytest.raises(vica.ViCAError, match=f"forward takes no {name}"):
        model(torch.tensor([[5, 6]]), **{name: torch.ones(1, 2)})


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_counts_images_too(model, beams):
    with pytest.raises(vica.ViCAError, match="hold 2 image placeholders, but 1 images"):
        model.generate(torch.tensor([[5, IMAGE, IMAGE, 6]]), image_features=features(3), num_beams=beams)


def test_nothing_can_follow_an_image_directly(model):
    with pytest.raises(vica.ViCAError, match="row 0 ends with an image"):
        model.generate(torch.tensor([[5, IMAGE]]), image_features=features(3), max_new_tokens=1)


def test_layers_nobody_named(model):
    unnamed = vica.ViCAForConditionalGeneration(tiny_config(t2v_layers=None))
    assert unnamed(torch.tensor([[5, 6]])).logits.shape == (1, 2, 97), "text alone needs none"
    with pytest.raises(vica.ViCAError, match="needs t2v_layers"):
        unnamed(torch.tensor([[5, IMAGE, 6]]), image_features=features(3))


def test_a_refused_rewiring_changes_nothing(model):
    model.set_variant("accel", [1], False)
    with pytest.raises(vica.ViCAError, match="variant is 'fast'"):
        model.set_variant("fast", [2], True)
    assert (model.config.variant, model.config.t2v_layers, model.config.freeze_prefix) == ("accel", [1], False)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(mm_projector_type="conv"), "mm_projector_type is 'conv'"),
        (dict(mm_vision_select_feature="cls"), "mm_vision_select_feature is 'cls'"),
        (dict(text_config=dict(attention_dropout=0.1)), "attention_dropout is 0.1"),
        (dict(text_config=dict(model_type="mpt")), "model_type 'mpt'"),
        (dict(text_config=dict(rope_parameters=dict(rope_type="dynamic", factor=2.0))), "rope_type is 'dynamic'"),
        (dict(text_config=dict(num_attention_heads=5)), "text_config: .*not a multiple"),
        (dict(vision_config=dict(num_attention_heads=5)), "vision_config: .*not a multiple"),
        (dict(vision_config=dict(model_type="none such")), "vision_config: .*none such"),
    ],
)
def test_settings(changes, message):
    with pytest.raises(vica.ViCAError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize("changes, message", [
    (dict(mm_vision_select_layer=-9), "mm_vision_select_layer is -9; the tower has 3 layers"),
    (dict(vision_config=dict(model_type="vit")), "model_type 'vit'"),
])  # fmt: skip
def test_towers(changes, message):
    with pytest.raises(vica.ViCAError, match=message):
        vica.ViCAForConditionalGeneration(tiny_config(**{"vision_config": tiny_vision(), **changes}))
