"""What the cache holds, to the byte, and how it refuses misuse."""

import pytest
import torch
from transformers import DynamicCache

import vica
from tests.builders import Row, batch, image, tiny_model

HEADS, HEAD_DIM, FLOAT = 2, 8, 4
ENTRY = 2 * HEADS * HEAD_DIM * FLOAT  # bytes of one token's key and value in one layer


@torch.no_grad()
def prefill(variant, **changes):
    model = tiny_model(variant=variant, t2v_layers=[0, 2], **changes)
    return model, model(**batch([Row((3, image(10), 5))]), use_cache=True).past_key_values


def test_only_t2v_layers_hold_visual_entries():
    _, cache = prefill("accel")
    text, everything = 8 * ENTRY, 18 * ENTRY
    assert cache.kv_bytes() == [everything, text, everything, text]


def test_decoding_adds_one_entry_a_layer():
    model, cache = prefill("accel")
    for _ in range(3):
        with torch.no_grad():
            model(torch.tensor([[4]]), past_key_values=cache)
    assert cache.kv_bytes() == [21 * ENTRY, 11 * ENTRY, 21 * ENTRY, 11 * ENTRY]
    assert cache.get_seq_length() == 9 + 3, "columns of input_ids: the placeholder is one"
    assert cache.next_pos.tolist() == [18 + 3], "positions: each visual token is one"


@pytest.mark.parametrize("variant", ["dense", "mask"])
def test_full_sequence_variants_hold_all_everywhere(variant):
    assert prefill(variant)[1].kv_bytes() == [18 * ENTRY] * 4


def test_text_only_rows_cost_what_llama_costs():
    model = tiny_model(variant="accel")
    with torch.no_grad():
        cache = model(**batch([Row((7,))]), use_cache=True).past_key_values
    assert cache.kv_bytes() == [7 * ENTRY] * 4


def test_a_cache_of_another_variant_is_refused():
    model, cache = prefill("accel")
    model.set_variant("mask")
    with pytest.raises(vica.ViCAError, match="made by variant 'accel'"):
        model(torch.tensor([[4]]), past_key_values=cache)


@pytest.mark.parametrize("change", [dict(t2v_layers=[1, 2]), dict(freeze_prefix=False)], ids=str)
def test_a_cache_of_another_wiring_is_refused(change):
    model, cache = prefill("accel")
    model.set_variant(**change)
    with pytest.raises(vica.ViCAError, match="other t2v_layers or another prefix rule"):
        model(torch.tensor([[4]]), past_key_values=cache)


def test_a_cache_of_another_kind_or_size_is_refused():
    model, cache = prefill("accel")
    with pytest.raises(vica.ViCAError, match="DynamicCache"):
        model(torch.tensor([[4]]), past_key_values=DynamicCache())
    with pytest.raises(vica.ViCAError, match="hold 1 rows, input_ids 2"):
        model(torch.tensor([[4], [5]]), past_key_values=cache)
    with pytest.raises(vica.ViCAError, match=r"attention_mask is \[1, 1\].*\[1, 10\]"):
        model(torch.tensor([[4]]), attention_mask=torch.ones(1, 1), past_key_values=cache)
    with pytest.raises(vica.ViCAError, match="cache_implementation 'static'"):
        model.generate(torch.tensor([[4]]), cache_implementation="static", max_new_tokens=2)


def test_a_cache_can_be_emptied_and_used_again():
    model, cache = prefill("accel")
    inputs = batch([Row((2, image(3), 2), 1), Row((6,), 2)])
    with torch.no_grad():
        want = model(**inputs).logits
        cache.reset()
        assert torch.equal(model(**inputs, past_key_values=cache).logits, want)


@pytest.mark.parametrize("variant", ["accel", "mask", "dense"])
@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
@torch.no_grad()
def test_rows_move_with_all_that_is_known_of_them(change, variant):
    model = tiny_model(variant=variant)
    rows = [Row((3, image(4), 5)), Row((6,), 1), Row((2, image(2), 2, image(7), 1), 2)]
    order = [0, 0, 1, 1, 2, 2] if change == "batch_repeat_interleave" else [2, 0, 1]
    cache = model(**batch(rows), use_cache=True).past_key_values
    getattr(cache, change)(2 if change == "batch_repeat_interleave" else torch.tensor(order))
    got = model(torch.full((len(order), 1), 7), past_key_values=cache).logits
    fresh = model(**batch([rows[i] for i in order]), use_cache=True).past_key_values
    assert torch.allclose(got, model(torch.full((len(order), 1), 7), past_key_values=fresh).logits, atol=1e-5)


@torch.no_grad()
def test_a_placeholder_uttered_before_the_first_image_stays_text():
    """Its row's prefix is made anew when an image comes, and the word must not be taken for one then."""
    word = 96
    model = tiny_model(image_token_index=word, freeze_prefix=True)
    cache = model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    model(torch.tensor([[word]]), past_key_values=cache)
    features = [torch.randn(3, 32, generator=torch.Generator().manual_seed(0))]
    got = model(torch.tensor([[7, word, 8]]), image_features=features, past_key_values=cache).logits
    same = tiny_model(freeze_prefix=True)  # the same weights, with a placeholder outside the vocabulary
    want = same(torch.tensor([[5, 6, word, 7, -200, 8]]), image_features=features).logits[:, -3:]
    assert torch.allclose(got, want, atol=1e-5)
