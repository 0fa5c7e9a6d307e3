"""dense is transformers' own LLaVA, and without an image every variant is transformers' own Llama."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import vica
from tests.builders import VOCAB, assert_close, tiny_config, tiny_vision
from vica.plan import formats

SIZES = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    vocab_size=VOCAB, max_position_embeddings=512,
)  # fmt: skip


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.1 * torch.randn_like(p) if "norm" in name and p.dim() == 1 else torch.randn_like(p) * 0.2)
    return model.eval()


def ours_from(theirs, **config) -> vica.ViCAForConditionalGeneration:
    model = vica.ViCAForConditionalGeneration(tiny_config(**config))
    weights = {formats.our_name(k, "hf"): v for k, v in theirs.state_dict().items()}
    model.load_state_dict(weights, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def llava():
    config = LlavaConfig(
        text_config=LlamaConfig(**SIZES), vision_config=CLIPVisionConfig(**tiny_vision()), image_token_index=VOCAB - 1,
        image_seq_length=16,
    )  # fmt: skip
    return randomise(LlavaForConditionalGeneration(config))


@pytest.fixture(scope="module")
def dense(llava):
    return ours_from(
        llava, text_config=SIZES, vision_config=tiny_vision(), variant="dense", image_token_index=VOCAB - 1
    )


def inputs(text_lengths=((3, 6), (3, 6)), images=1):
    """The same rows for both: one placeholder for us, 16 for transformers."""
    random = torch.Generator().manual_seed(2)
    ours, theirs = [], []
    for before, after in text_lengths:
        a = torch.randint(3, VOCAB - 1, (before,), generator=random).tolist()
        b = torch.randint(3, VOCAB - 1, (after,), generator=random).tolist()
        ours.append(a + [VOCAB - 1] * images + b)
        theirs.append(a + [VOCAB - 1] * 16 * images + b)
    pixels = torch.randn(len(ours) * images, 3, 28, 28, generator=random)
    pad = lambda rows: torch.tensor([[0] * (max(map(len, rows)) - len(r)) + r for r in rows])  # noqa: E731
    mask = lambda rows: torch.tensor([[0] * (max(map(len, rows)) - len(r)) + [1] * len(r) for r in rows])  # noqa: E731
    make = lambda rows: dict(input_ids=pad(rows), attention_mask=mask(rows), pixel_values=pixels)  # noqa: E731
    return make(ours), make(theirs)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("lengths", [((3, 6), (3, 6)), ((5, 2), (1, 7), (0, 4))])
@torch.no_grad()
def test_logits_equal_llava(llava, dense, lengths, images):
    a, b = inputs(lengths, images)
    want, got = llava(**b).logits, dense(**a).logits
    for row in range(len(got)):
        text = (b["attention_mask"][row] == 1) & (b["input_ids"][row] != VOCAB - 1)
        here = (a["attention_mask"][row] == 1) & (a["input_ids"][row] != VOCAB - 1)
        assert_close(got[row][here], want[row][text], what=f"row {row}")


def test_greedy_tokens_equal_llava(llava, dense):
    a, b = inputs(((5, 2), (1, 7)))
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    want, got = llava.generate(**b, **options), dense.generate(**a, **options)
    assert torch.equal(got[:, a["input_ids"].shape[1] :], want[:, b["input_ids"].shape[1] :])


@pytest.mark.parametrize("layer, feature, strategy", [(-1, "cls_patch", "full"), (-3, "patch", "default")])
@torch.no_grad()
def test_image_features_equal_llava(llava, layer, feature, strategy):
    model = ours_from(
        llava,
        text_config=SIZES,
        vision_config=tiny_vision(),
        mm_vision_select_layer=layer,
        mm_vision_select_feature=feature,
    )
    pixels = torch.randn(2, 3, 28, 28)
    want = llava.model.get_image_features(pixels, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    want = getattr(want, "pooler_output", want)
    assert_close(model.get_image_features(pixels), torch.stack(list(want)))


@torch.no_grad()
def test_siglip_features_equal_transformers():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
    )
    theirs = randomise(SiglipVisionModel(SiglipVisionConfig(**sizes)))
    model = vica.ViCAForConditionalGeneration(tiny_config(vision_config={"model_type": "siglip_vision_model", **sizes}))
    tower = model.model.vision_tower
    state = {k.removeprefix("vision_model."): v for k, v in theirs.state_dict().items()}
    tower.vision_tower.vision_model.load_state_dict(state, strict=True)
    pixels = torch.randn(2, 3, 28, 28)
    assert_close(tower.eval()(pixels), theirs(pixels, output_hidden_states=True).hidden_states[-2])


BACKBONES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama 3 rope": (
        LlamaForCausalLM,
        LlamaConfig,
        dict(rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                                  high_freq_factor=4.0, original_max_position_embeddings=64)),
    ),
    "biased llama": (LlamaForCausalLM, LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "wide heads": (LlamaForCausalLM, LlamaConfig, dict(head_dim=16)),
    "mistral": (MistralForCausalLM, MistralConfig, dict(sliding_window=None, rope_theta=1e6)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, dict(use_sliding_window=False)),
    "tied qwen2": (Qwen2ForCausalLM, Qwen2Config, dict(use_sliding_window=False, tie_word_embeddings=True)),
}  # fmt: skip


@pytest.mark.parametrize("variant", ["accel", "mask", "dense"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_without_image_it_is_the_plain_backbone(backbone, variant):
    model_class, config_class, changes = BACKBONES[backbone]
    theirs = randomise(model_class(config_class(**{**SIZES, **changes})))
    config = vica.ViCAConfig(text_config=theirs.config, variant=variant, t2v_layers=[1])
    ours = vica.ViCAForConditionalGeneration(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        want, got = theirs(ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits
    assert_close(got[mask == 1], want[mask == 1])
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
