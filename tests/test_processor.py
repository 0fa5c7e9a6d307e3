"""ViCAProcessor against independent referees: sentencepiece itself for the token ids, hand-made arithmetic for the
pixels, hand-written prompts for the chats."""

import base64
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.pipelines import ImageTextToTextPipeline

from vica.data.conversation import VICUNA_SYSTEM, get_template
from vica.data.processor import ViCAProcessor
from vica.data.tokenizer import add_image_token, load_tokenizer, tokenize_prompt
from vica.errors import ViCAError

CORPUS = (
    f"{VICUNA_SYSTEM}\nUSER: What is in the image? ASSISTANT: A red square stands left of a blue circle.\n"
    "USER: How many shapes are there? Answer the question using a single word or phrase. ASSISTANT: 3\n"
    "The quick brown fox jumps over the lazy dog. Is the cat on the mat? Yes, it is on the mat.\n"
).splitlines() * 20 + [f"There are {n} birds and {n * 7} trees in picture {n}.{' ' * (n % 12)}the" for n in range(240)]
BOS, EOS, IMAGE = 1, 2, -200
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ---- the tokenizer, and its referee -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> bytes:
    prefix = tmp_path_factory.mktemp("sentencepiece") / "model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(prefix.with_suffix(".model").read_bytes())
    runs_of_spaces = [piece for piece in proto.pieces if set(piece.piece) == {"\u2581"}]
    assert len(runs_of_spaces) > 3
    for piece in runs_of_spaces:  # as in Llama's vocabulary, where they keep their low ids
        piece.score = -1e9
    return proto.SerializeToString()


def added_token(content: str, **more) -> dict:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **more}


def llava_folder(folder, model: bytes, legacy: bool | None, model_type: str | None = None, **changed):
    """The tokenizer files of a LLaVA-1.5 checkpoint, which transformers 4 wrote; `legacy` None: not written."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": legacy,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **{name: added_token(content, __type="AddedToken") for name, content in named.items()},
        **changed,
    }
    if legacy is None:
        del config["legacy"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = {name: added_token(content) for name, content in named.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "<unk>"}))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def slow_llama_ids(model: bytes, text: str, legacy: bool) -> list[int]:
    """The slow LlamaTokenizer that LLaVA used: special tokens are cut out first, the rest goes to sentencepiece. Its
    dummy prefix is written before every piece (legacy), or before the whole text."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = legacy
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    if not legacy and text and not re.match(r"<s>|</s>|<unk>", text):
        text = " " + text
    ids = [BOS]
    for part in re.split(r"(<s>|</s>|<unk>)", text):
        ids += [pieces.PieceToId(part)] if part in ("<s>", "</s>", "<unk>") else pieces.EncodeAsIds(part)
    return ids


def llava_ids(model: bytes, prompt: str, legacy: bool) -> list[int]:
    chunks = [slow_llama_ids(model, chunk, legacy)[1:] for chunk in prompt.split("<image>")]
    return [BOS, *chunks[0], *(token for chunk in chunks[1:] for token in [IMAGE, *chunk])]


@pytest.fixture(scope="session")
def folders(tmp_path_factory, sentencepiece_model):
    """One checkpoint folder for each pair of legacy and model_type."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        (legacy, kind): llava_folder(root / f"{legacy}-{kind}", sentencepiece_model, legacy, kind)
        for legacy in (True, False, None)
        for kind in (None, "llava", "llava_llama", "mistral")
    }


@pytest.fixture
def tokenizer(folders):
    return load_tokenizer(folders[False, "llava_llama"])


@pytest.fixture
def processor(tokenizer):
    return ViCAProcessor(CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square(28)), tokenizer)


def square(side: int) -> dict:
    return {"height": side, "width": side}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PROMPTS = [
    "",
    get_template("vicuna_v1").render([("user", "<image>\nWhat is in the image?")]),
    get_template("vicuna_v1").render([("user", "<image>\nHow many?"), ("assistant", "3"), ("user", "Sure?")]),
    get_template("llama_2").render([("user", "<image>\nHow many?"), ("assistant", "3"), ("user", "<image>\nSure?")]),
    get_template("mistral").render([("user", "Is <image> like <image> or like  <image>?"), ("assistant", "No.")]),
    "<image>",
    "<image><image>\n\n<image> ",
    " leading",
    "  two spaces",
    "def f(x):\n    the\n         a  the   a",
    *(f"a{' ' * length}the" for length in range(1, 20)),
    " ",
    "\n",
    "a  b   c ",
    "</s>",
    "</s> after",
    "before </s>  after</s>\nnext",
    "<s>hello <s> hello",
    "   </s>   ",
    "a<unk>b <unk> c",
    "naïve café – “quotes” … ﬁ ①",
    "日本語 🙂 👩‍👩‍👧 \u200b\u00a0\u3000 e\u0301",
    "\u2581visible \u2581\u2581 spaces\u2581",
    "</s>\u2581x <image> \u2581x",
    "\ttab\r\nwindows\x00null\ufeff",
    "<0x0A> </s < /s>",
    "2024 365 ٣५",
]
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
    rule = legacy is not False  # transformers 4, which wrote these folders, took a missing "legacy" for true
    expected = [llava_ids(sentencepiece_model, prompt, rule) for prompt in PROMPTS]
    assert [tokenize_prompt(prompt, tokenizer) for prompt in PROMPTS] == expected
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert [tokenize_prompt(prompt, again) for prompt in PROMPTS] == expected


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_loaded_by_others_is_set_right(folders, sentencepiece_model, legacy, kind):
    processor = ViCAProcessor(tokenizer=AutoTokenizer.from_pretrained(folders[legacy, kind]))
    for prompt in PROMPTS:
        assert processor.tokenize(prompt) == llava_ids(sentencepiece_model, prompt, legacy)


def test_what_transformers_5_wrote_without_legacy_is_not_legacy(folders, sentencepiece_model, tmp_path):
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
    """The same by hand, for the case that transformers 5 gets wrong for legacy tokenizers: "USER" after "</s>"."""
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


# ---- the call ---------------------------------------------------------------------------------------------------


def test_one_text_one_image(processor):
    out = processor(text="<image>\nWhat?", images=picture(50, 30))
    assert sorted(out) == ["attention_mask", "input_ids", "pixel_values"]
    assert out["input_ids"].tolist() == [processor.tokenize("<image>\nWhat?")]
    assert out["input_ids"].dtype == out["attention_mask"].dtype == torch.int64
    assert out["attention_mask"].tolist() == [[1] * out["input_ids"].shape[1]]
    assert out["pixel_values"].shape == (1, 3, 28, 28)
    assert out["pixel_values"].dtype == torch.float32
    assert sorted(processor(text="Hi")) == ["attention_mask", "input_ids"]
    assert sorted(processor(images=picture(5, 5))) == ["pixel_values"]
    assert sorted(processor(text=["Hi", "Ho"], images=[[], []])) == ["attention_mask", "input_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(processor, side):
    texts = ["<image>\nWhat is it?", "Hi", "<image> or <image>?"]
    out = processor(text=texts, padding_side=side)
    width = out["input_ids"].shape[1]
    for row, mask, text in zip(out["input_ids"].tolist(), out["attention_mask"].tolist(), texts, strict=True):
        ids = processor.tokenize(text)
        pad = width - len(ids)
        assert row == ([0] * pad + ids if side == "left" else ids + [0] * pad)
        assert mask == ([0] * pad + [1] * len(ids) if side == "left" else [1] * len(ids) + [0] * pad)
    processor.tokenizer.padding_side = side
    assert torch.equal(processor(text=texts)["input_ids"], out["input_ids"])
    wide = processor(text=texts, padding="max_length", max_length=width + 3)["input_ids"]
    assert wide.shape[1] == width + 3


def test_pad_id_falls_back_to_eos_then_zero(processor):
    texts = ["Hi", "Hi there"]
    for pad, eos, expected in [("A", "</s>", "A"), (None, "</s>", "</s>"), (None, None, "<unk>")]:
        processor.tokenizer.pad_token, processor.tokenizer.eos_token = pad, eos
        padded = processor(text=texts, padding_side="right")["input_ids"][0, -1]
        assert processor.tokenizer.convert_ids_to_tokens(padded.item()) == expected


def test_plain_lists(processor):
    out = processor(text=["Hi", "Hi <image> there"], images=picture(9, 9), padding=False, return_tensors=None)
    assert out["input_ids"] == [processor.tokenize("Hi"), processor.tokenize("Hi <image> there")]
    assert [len(row) for row in out["attention_mask"]] == [len(row) for row in out["input_ids"]]
    assert isinstance(out["pixel_values"][0], np.ndarray)


def test_truncation_never_cuts_an_image(processor):
    ids = processor.tokenize("one two <image>")
    assert processor(text="one two <image>", truncation=True, max_length=len(ids))["input_ids"].tolist() == [ids]
    assert processor(text="one two", truncation=True, max_length=3)["input_ids"].tolist() == [ids[:3]]
    with pytest.raises(ViCAError, match=f"max_length={len(ids) - 1} would cut an image"):
        processor(text="one two <image>", truncation=True, max_length=len(ids) - 1)
    with pytest.raises(ViCAError, match="needs max_length"):
        processor(text="one two", truncation=True)


def test_images_in_any_nesting(processor, tmp_path):
    first, second = picture(50, 30, seed=1), picture(30, 50, seed=2)
    first.save(tmp_path / "first.png")
    texts = ["<image>\na", "b", "<image>\nc"]
    flat = processor(text=texts, images=[first, second])["pixel_values"]
    assert flat.shape[0] == 2
    for nested in ([[first], [], [second]], [[first], None, second], (first, second)):
        assert torch.equal(processor(text=texts, images=nested)["pixel_values"], flat)
    assert torch.equal(processor(text="<image>", images=str(tmp_path / "first.png"))["pixel_values"], flat[:1])


def test_marks_and_images_must_agree(processor):
    image = picture(9, 9)
    with pytest.raises(ViCAError, match="the text has 2 <image> marks, but 1 images were given"):
        processor(text=["<image>", "<image>"], images=image)
    with pytest.raises(ViCAError, match="the text has 0 <image> marks, but 1 images"):
        processor(text="Hi", images=[image])
    with pytest.raises(ViCAError, match="the text has 1 <image> marks, but 0 images"):
        processor(text="<image>", images=[])
    with pytest.raises(ViCAError, match="text 1 has 0 <image> marks, but 2 images were given for it"):
        processor(text=["<image><image>", "Hi"], images=[[image, image], [image, image]])
    with pytest.raises(ViCAError, match="2 texts were given, but 1 lists"):
        processor(text=["<image>", "Hi"], images=[[image]])


def test_without_a_tower(tokenizer):
    processor = ViCAProcessor(tokenizer=tokenizer)
    assert processor(text="<image>\nHi")["input_ids"].tolist() == [processor.tokenize("<image>\nHi")]
    with pytest.raises(ViCAError, match="no vision tower"):
        processor(text="<image>\nHi", images=picture(9, 9))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ({}, "needs text, images or both"),
        ({"text": 3}, "text must be a string or a non-empty list of strings, got 3"),
        ({"text": []}, "non-empty list of strings"),
        ({"text": ["a", None]}, "got \\['a', None\\]"),
        ({"text": "a", "videos": ["v"]}, "takes no videos; known options: padding"),
        ({"text": ["a", "b c d e"], "padding": False}, "make no rectangular tensor"),
        ({"text": "a b c d e", "padding": "max_length"}, "padding is 'max_length'"),
        ({"text": ["a", "a b c d e"], "padding": "max_length", "max_length": 3}, "make no rectangular tensor"),
        ({"text": "a", "padding": "most"}, "padding is 'most'"),
        ({"text": "a", "padding_side": "top"}, "padding_side is 'top'"),
        ({"text": "<image>", "images": "absent.png"}, "image 'absent.png': no such file"),
    ],
)
def test_mistakes(processor, call, complaint):
    with pytest.raises(ViCAError, match=complaint):
        processor(**call)


def test_options_of_other_processors_may_be_unset(processor):
    processor(text="Hi", videos=None, audio=None, return_mm_token_type_ids=False)


def test_constructor_mistakes(tokenizer):
    with pytest.raises(ViCAError, match="image_mode is 'stretch'; it must be one of pad, resize, crop"):
        ViCAProcessor(tokenizer=tokenizer, image_mode="stretch")
    with pytest.raises(ViCAError, match="unknown conversation template 'v9'"):
        ViCAProcessor(tokenizer=tokenizer, conversation="v9")
    with pytest.raises(ViCAError, match="tokenizer is of type NoneType"):
        ViCAProcessor()
    with pytest.raises(ViCAError, match="image processor 'ViTImageProcessor' is not supported"):
        ViCAProcessor({"image_processor_type": "ViTImageProcessor"}, tokenizer)


# ---- pixels -----------------------------------------------------------------------------------------------------

SIZES = [(50, 30), (31, 77), (28, 28), (10, 10), (1, 9)]


def normalized(image: Image.Image, mean, std) -> np.ndarray:
    scaled = (np.asarray(image) * (1 / 255)).astype(np.float32)
    return ((scaled - np.array(mean, np.float32)) / np.array(std, np.float32)).transpose(2, 0, 1)


def clip_pixels(image: Image.Image, side: int) -> np.ndarray:
    """The shortest edge to `side`, the centre cut out."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(side * width / short), int(side * height / short)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return normalized(image.crop((left, top, left + side, top + side)), CLIP_MEAN, CLIP_STD)


def padded(image: Image.Image, colour) -> Image.Image:
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


@pytest.mark.parametrize("size", SIZES)
def test_clip_pixels(processor, size):
    image = picture(*size)
    expected = {
        "pad": clip_pixels(padded(image, (122, 116, 104)), 28),
        "resize": clip_pixels(image.resize((28, 28)), 28),
        "crop": clip_pixels(image, 28),
    }
    for mode, pixels in expected.items():
        processor.image_mode = mode
        np.testing.assert_array_equal(processor(images=image)["pixel_values"][0].numpy(), pixels)


@pytest.mark.parametrize("size", SIZES)
def test_siglip_pixels(tokenizer, size):
    image = picture(*size)
    half = (0.5, 0.5, 0.5)
    squashed = normalized(image.resize((28, 28), Image.Resampling.BICUBIC), half, half)
    in_square = padded(image, (127, 127, 127)).resize((28, 28), Image.Resampling.BICUBIC)
    expected = {"pad": normalized(in_square, half, half), "resize": squashed, "crop": squashed}
    for mode, pixels in expected.items():
        processor = ViCAProcessor(SiglipImageProcessorPil(size=square(28)), tokenizer, image_mode=mode)
        np.testing.assert_array_equal(processor(images=image)["pixel_values"][0].numpy(), pixels)


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"])
def test_other_backends_become_the_pil_one(tokenizer, name):
    saved = {"image_processor_type": name, "size": {"shortest_edge": 14}, "crop_size": square(14)}
    for given_ in (saved, SimpleNamespace(to_dict=lambda: saved)):
        processor = ViCAProcessor(given_, tokenizer)
        assert type(processor.image_processor) is CLIPImageProcessorPil
        assert processor(images=picture(9, 9))["pixel_values"].shape == (1, 3, 14, 14)


# ---- chats ------------------------------------------------------------------------------------------------------


def user(*parts) -> dict:
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


IMAGE_PART = {"type": "image", "image": picture(50, 30)}


def test_images_come_first_in_a_chat(processor):
    start = f"{VICUNA_SYSTEM} USER: "
    for parts, text in [
        ((IMAGE_PART, "What?"), "<image>\nWhat?"),
        (("What?", IMAGE_PART), "<image>\nWhat?"),
        (("Is", IMAGE_PART, "like", IMAGE_PART), "<image>\n<image>\nIs\nlike"),
        ((IMAGE_PART,), "<image>\n"),
        (("Hi",), "Hi"),
    ]:
        assert processor.apply_chat_template([user(*parts)]) == f"{start}{text} "
        opened = processor.apply_chat_template([user(*parts)], add_generation_prompt=True)
        assert opened == f"{start}{text} ASSISTANT:"
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}]) == f"{start}Hi "


def test_a_whole_chat(processor):
    chat = [{"role": "system", "content": "Be brief."}, user(IMAGE_PART, "What?"), assistant("A cat."), user("Sure?")]
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert rendered == "Be brief. USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    opened = processor.apply_chat_template(chat[:3], continue_final_message=True)
    assert opened == "Be brief. USER: <image>\nWhat? ASSISTANT: A cat."
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    expected = processor(text=rendered, images=IMAGE_PART["image"])
    assert sorted(inputs) == sorted(expected)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    ids = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    assert torch.equal(ids, expected["input_ids"])


def test_a_batch_of_chats(processor):
    chats = [[user(IMAGE_PART, "What?")], [user("Hi")]]
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    assert [prompt.count("<image>") for prompt in prompts] == [1, 0]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs={"padding_side": "left"}
    )
    expected = processor(text=prompts, images=[IMAGE_PART["image"]], padding_side="left")
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    single = processor.apply_chat_template(chats[:1], tokenize=True, return_tensors=None, padding=False)
    assert single == [processor.tokenize(processor.apply_chat_template(chats[0]))]


def test_every_kind_of_image_part(processor, tmp_path):
    path = tmp_path / "picture.png"
    IMAGE_PART["image"].save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    expected = processor(images=path)["pixel_values"]
    for part in [
        {"type": "image", "path": str(path)},
        {"type": "image", "url": str(path)},
        {"type": "image", "image": path},
        {"type": "image", "image": None, "base64": encoded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{encoded}"},
    ]:
        inputs = processor.apply_chat_template([user(part, "Hi")], tokenize=True, return_dict=True)
        assert torch.equal(inputs["pixel_values"], expected)


def test_placeholders_leave_the_images_to_the_caller(processor):
    inputs = processor.apply_chat_template([user({"type": "image"}, "Hi")], tokenize=True, return_dict=True)
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    with pytest.raises(ViCAError, match="names no source; give one of image, url, path, base64"):
        processor.apply_chat_template([user({"type": "image"}, IMAGE_PART)], tokenize=True)


@pytest.mark.parametrize(
    ("chat", "options", "complaint"),
    [
        ([], {}, "a conversation is a non-empty list"),
        ("Hi", {}, "a conversation is a non-empty list of messages, got 'Hi'"),
        (["Hi"], {}, "a message is a dict with role and content, got 'Hi'"),
        ([{"role": "user"}], {}, "a message is a dict with role and content"),
        ([{"role": "user", "content": None}], {}, "content is a string or a list of parts, got None"),
        ([user({"type": "video"})], {}, "of type text or image, got {'type': 'video'}"),
        ([user({"type": "text"})], {}, "of type text or image"),
        ([user("a"), {"role": "assistant", "content": [IMAGE_PART]}], {}, "'assistant' holds an image"),
        ([assistant("a")], {}, "turn 1 has role 'assistant'"),
        ([user("a")], {"continue_final_message": True}, "ends with an assistant message"),
        ([user("a")], {"tools": [{}]}, "takes no tools"),
        ([user("a")], {"tools": []}, "takes no tools"),
        ([user("a")], {"chat_template": "{{ messages }}"}, "takes no chat_template"),
        ([user("a")], {"processor_kwargs": {"images_kwargs": {}}}, "takes no images_kwargs"),
        ([user("a"), assistant("b")], {"add_generation_prompt": True, "continue_final_message": True}, "exclude"),
    ],
)
def test_chat_mistakes(processor, chat, options, complaint):
    with pytest.raises(ViCAError, match=complaint):
        processor.apply_chat_template(chat, **options)


def test_unset_template_options_pass(processor):
    processor.apply_chat_template([user("a")], tools=None, documents=None, load_audio_from_video=False)


# ---- saving, loading, transformers' own machinery ---------------------------------------------------------------


class ThrowawayConfig(PreTrainedConfig):
    model_type = "vica_processor_test"
    vision_config = None
    image_aspect_ratio = "square"
    conversation = "mistral"
    image_token_index = -7


AutoConfig.register(ThrowawayConfig.model_type, ThrowawayConfig)
AutoProcessor.register(ThrowawayConfig, ViCAProcessor)


@pytest.mark.parametrize("loader", [ViCAProcessor, AutoProcessor])
@pytest.mark.parametrize("legacy", [True, False])
def test_round_trip(folders, sentencepiece_model, tmp_path, loader, legacy):
    clip = CLIPImageProcessorPil(size={"shortest_edge": 14}, crop_size=square(14), image_mean=(0.1, 0.2, 0.3))
    saved = ViCAProcessor(clip, load_tokenizer(folders[legacy, None]), "llama_2", "resize", -300)
    saved.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == sentencepiece_model
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is ViCAProcessor
    assert type(loaded.image_processor) is CLIPImageProcessorPil
    assert loaded.to_dict() == saved.to_dict()
    assert (loaded.conversation, loaded.image_mode, loaded.image_token_index) == ("llama_2", "resize", -300)
    image = picture(50, 30)
    for prompt in PROMPTS:
        ids = [-300 if token == IMAGE else token for token in llava_ids(sentencepiece_model, prompt, legacy)]
        assert loaded.tokenize(prompt) == ids
    assert torch.equal(loaded(images=image)["pixel_values"], saved(images=image)["pixel_values"])
    assert "ViCAProcessor" in repr(loaded)


@pytest.mark.parametrize("loader", [ViCAProcessor, AutoProcessor])
def test_round_trip_without_a_tower(tokenizer, tmp_path, loader):
    ViCAProcessor(tokenizer=tokenizer, conversation="plain").save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert loaded.image_processor is None
    assert loaded.conversation == "plain"
    assert loaded.model_input_names == ["input_ids", "attention_mask", "pixel_values"]
    assert loader.from_pretrained(tmp_path, image_mode="crop").image_mode == "crop"
    with pytest.raises(ViCAError, match="call processor.push_to_hub"):
        loaded.save_pretrained(tmp_path, push_to_hub=True)


@pytest.mark.parametrize("loader", [ViCAProcessor, AutoProcessor])
def test_a_folder_without_a_processor_is_read_by_its_config(sentencepiece_model, tmp_path, loader):
    llava_folder(tmp_path, sentencepiece_model, None, ThrowawayConfig.model_type)
    loaded = loader.from_pretrained(tmp_path)
    assert (loaded.conversation, loaded.image_mode, loaded.image_token_index) == ("mistral", "crop", -7)
    assert loaded.tokenize("3</s>USER") == llava_ids(sentencepiece_model, "3</s>USER", legacy=True)


def config_of(ratio, tower: str | None, side: int = 42) -> SimpleNamespace:
    vision = None if tower is None else SimpleNamespace(model_type=tower, image_size=side)
    return SimpleNamespace(vision_config=vision, image_aspect_ratio=ratio, conversation="v1", image_token_index=IMAGE)


@pytest.mark.parametrize(
    ("ratio", "mode"), [("pad", "pad"), ("resize", "resize"), ("crop", "crop"), ("square", "crop"), (None, "crop")]
)
def test_from_config(tokenizer, ratio, mode):
    processor = ViCAProcessor.from_config(config_of(ratio, "clip_vision_model"), tokenizer)
    assert (processor.image_mode, processor.conversation) == (mode, "vicuna_v1")
    processor.image_mode = "crop"
    pixels = processor(images=picture(50, 30))["pixel_values"][0].numpy()
    np.testing.assert_array_equal(pixels, clip_pixels(picture(50, 30), 42))


def test_from_config_with_siglip_or_no_tower(tokenizer):
    siglip = ViCAProcessor.from_config(config_of("pad", "siglip_vision_model"), tokenizer)
    assert type(siglip.image_processor) is SiglipImageProcessorPil
    assert siglip(images=picture(50, 30))["pixel_values"].shape == (1, 3, 42, 42)
    assert tuple(siglip.image_processor.image_mean) == tuple(siglip.image_processor.image_std) == (0.5, 0.5, 0.5)
    assert ViCAProcessor.from_config(config_of("pad", None), tokenizer).image_processor is None
    with pytest.raises(ViCAError, match="'dinov2' tower; known: clip_vision_model, siglip_vision_model"):
        ViCAProcessor.from_config(config_of("pad", "dinov2"), tokenizer)
    with pytest.raises(ViCAError, match="image_aspect_ratio is 'anyres'; it must be one of pad, resize, crop, square"):
        ViCAProcessor.from_config(config_of("anyres", None), tokenizer)


class BlindLlama(LlamaForCausalLM):
    """Takes a ViCA model's inputs; sees no image."""

    def forward(self, input_ids=None, pixel_values=None, **kwargs):
        return super().forward(input_ids=input_ids.clamp(min=0), **kwargs)


@pytest.fixture
def pipe(processor):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
    )
    return ImageTextToTextPipeline(model=BlindLlama(config).eval(), processor=processor)


def test_pipeline_with_a_chat(pipe):
    chat = [user(IMAGE_PART, "What is in the image?")]
    answer = pipe(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    inputs = pipe.processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    ids = pipe.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    everything = pipe.processor.batch_decode(ids, skip_special_tokens=True)[0]
    assert answer
    assert everything.endswith("ASSISTANT:" + answer)
    full = pipe(text=[*chat, assistant("A red")], max_new_tokens=4)[0]["generated_text"]
    assert full[-1]["content"][-1]["text"].startswith("A red")


def test_pipeline_with_prompts(pipe):
    prompts = ["<image>\nWhat?", "<image>\nHow many shapes are there?"]
    out = pipe(text=prompts, images=[picture(50, 30), picture(9, 9)], max_new_tokens=3)
    assert [one["input_text"] for one in out] == prompts
    assert all(one["generated_text"].startswith(prompt) for one, prompt in zip(out, prompts, strict=True))
    assert pipe(text="Hi", max_new_tokens=3)[0]["generated_text"].startswith("Hi")


@pytest.mark.parametrize("legacy", [True, False])
def test_an_image_token_keeps_llavas_ids_around_it(tmp_path, sentencepiece_model, legacy):
    """As transformers' LlavaProcessor tokenizes, in one piece, with `<image>` as a token."""
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
