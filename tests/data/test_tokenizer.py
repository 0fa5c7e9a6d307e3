"""Tests token ids against LLaVA's slow tokenizer, with sentencepiece itself as the referee."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
)

from tests.spm import BOS, EOS, IMAGE, PROMPTS, llava_folder, llava_ids
from vica.data.conversation import VICUNA_SYSTEM, get_template
from vica.data.processor import ViCAProcessor
from vica.data.tokenizer import add_image_token, load_tokenizer, tokenize_prompt
from vica.testing import build_tokenizer

FRAGMENTS = [
    *("", " ", "  ", "\n", "\u2581", "a", "the", "USER:", "12", "é", "🙂", "."),
    "</s>",
    "<s>",
    "<unk>",
    "<image>",
]


@pytest.mark.parametrize("kind", [None, "llava", "llava_llama", "mistral"])
@pytest.mark.parametrize("legacy", [True, False, None])
def test_ids_are_those_of_llavas_slow_tokenizer(folders, sentencepiece_model, legacy, kind, tmp_path):
    tokenizer = load_tokenizer(folders[legacy, kind])
    assert type(tokenizer) is LlamaTokenizer
    rule = legacy is not False  # transformers 4, which wrote these folders, read a missing "legacy" as true
    expected = [llava_ids(sentencepiece_model, prompt, rule) for prompt in PROMPTS]
    assert [tokenize_prompt(prompt, tokenizer) for prompt in PROMPTS] == expected
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert [tokenize_prompt(prompt, again) for prompt in PROMPTS] == expected


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_loaded_elsewhere_is_corrected(folders, sentencepiece_model, legacy, kind):
    processor = ViCAProcessor(tokenizer=AutoTokenizer.from_pretrained(folders[legacy, kind]))
    for prompt in PROMPTS:
        assert processor.tokenize(prompt) == llava_ids(sentencepiece_model, prompt, legacy)


def test_a_transformers_5_folder_without_legacy_is_not_legacy(folders, sentencepiece_model, tmp_path):
    AutoTokenizer.from_pretrained(folders[False, None]).save_pretrained(tmp_path)
    assert "legacy" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    ids = tokenize_prompt("3</s>USER", load_tokenizer(tmp_path))
    assert ids == llava_ids(sentencepiece_model, "3</s>USER", legacy=False)


@pytest.fixture(scope="session")
def both_rules(folders):
    return {legacy: load_tokenizer(folders[legacy, None]) for legacy in (True, False)}


@settings(max_examples=300)
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=9), legacy=st.booleans())
def test_ids_of_any_mixture(both_rules, sentencepiece_model, fragments, legacy):
    prompt = "".join(fragments)
    assert tokenize_prompt(prompt, both_rules[legacy]) == llava_ids(sentencepiece_model, prompt, legacy)


def test_prefix_space_goes_where_the_slow_tokenizer_puts_it(both_rules):
    """Checks by hand the case that transformers 5 gets wrong for legacy tokenizers: "USER" after "</s>"."""
    for legacy, piece in [(True, "\u2581USER"), (False, "U")]:
        ids = tokenize_prompt("3</s>USER: 4", both_rules[legacy])
        after = both_rules[legacy].convert_ids_to_tokens(ids[ids.index(EOS) + 1])
        assert after.startswith(piece)


def test_bos_only_where_the_tokenizer_writes_one(tmp_path, sentencepiece_model, tokenizer):
    without = load_tokenizer(llava_folder(tmp_path / "no_bos", sentencepiece_model, False, add_bos_token=False))
    prompt = "a <image>\nb"
    assert tokenize_prompt(prompt, without) == tokenize_prompt(prompt, tokenizer)[1:]
    without.add_eos_token = True
    assert tokenize_prompt(prompt, without) == tokenize_prompt(prompt, tokenizer)[1:]
    assert tokenize_prompt(prompt, tokenizer, add_special_tokens=False) == tokenize_prompt(prompt, tokenizer)[1:]
    assert tokenize_prompt("<image>", tokenizer) == [BOS, IMAGE]
    assert tokenize_prompt("<image>", tokenizer, image_token_index=399) == [BOS, 399]


def test_other_tokenizers_are_left_alone(tmp_path, sentencepiece_model):
    folder = llava_folder(tmp_path / "bare", sentencepiece_model, False, add_prefix_space=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = tokenizer.backend_tokenizer.to_str()
    assert ViCAProcessor(tokenizer=tokenizer).tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["vicuna_v1", "llama_2", "mistral"])
def test_next_turn_ids_continue_the_conversation(both_rules, name, legacy):
    processor = ViCAProcessor(tokenizer=both_rules[legacy], conversation=name)
    template = get_template(name)
    first = [("user", "<image>\nHow many shapes?")]
    whole = template.render([*first, ("assistant", "3 birds."), ("user", "<image>\nSure?")])
    said = processor.tokenize(template.render([*first, ("assistant", "3 birds.")]))
    assert said[-1] == EOS
    assert said + processor.tokenize_next_turn("<image>\nSure?") == processor.tokenize(whole)


def test_decoding_drops_placeholders(processor):
    ids = processor(text="A red square<image>\nstands")["input_ids"]
    assert ids[0].tolist().count(IMAGE) == 1
    expected = "A red square \nstands"
    assert processor.batch_decode(ids, skip_special_tokens=True) == [expected]
    assert processor.post_process_image_text_to_text(ids) == [expected]
    assert processor.post_process_image_text_to_text(ids, skip_special_tokens=False) == [f"<s> {expected}"]
    for row in (ids[0], ids[0].tolist(), ids[0].numpy(), list(ids[0])):
        assert processor.decode(row, skip_special_tokens=True) == expected
    assert processor.batch_decode([[-100, IMAGE], []]) == ["", ""]
    assert processor.decode(EOS) == "</s>"


@pytest.mark.parametrize("legacy", [True, False])
def test_an_image_token_keeps_llavas_ids_around_it(tmp_path, sentencepiece_model, legacy):
    """Tokenizes as transformers' LlavaProcessor does, in one piece, with `<image>` as a token."""
    tokenizer = load_tokenizer(llava_folder(tmp_path, sentencepiece_model, legacy))
    add_image_token(tokenizer)
    image = tokenizer.convert_tokens_to_ids("<image>")
    for prompt in (
        f"{VICUNA_SYSTEM} USER: <image>\nWhat is in the image? ASSISTANT:",
        "<image>\n<image>\nWhat is in the images?",
        "Look at <image> and <image>, please. </s>USER: Yes",
        "What is this? <image>",
    ):
        want = [image if token == IMAGE else token for token in llava_ids(sentencepiece_model, prompt, legacy)]
        assert tokenizer(prompt).input_ids == want, prompt


def test_a_generic_tokenizer_follows_its_own_file(tmp_path, recwarn):
    """LLaVA's config beside the tokenizer must stay unread: transformers would warn about its fields."""
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama", "rope_scaling": None}))
    assert load_tokenizer(tmp_path).get_vocab() == build_tokenizer().get_vocab()
    assert not [warning for warning in recwarn if warning.category is FutureWarning]
