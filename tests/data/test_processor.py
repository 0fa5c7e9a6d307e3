"""Tests ViCAProcessor against independent referees: pixels computed by hand, and prompts written by hand."""

import base64
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.pipelines import ImageTextToTextPipeline

from tests.spm import IMAGE, PROMPTS, llava_folder, llava_ids
from vica.data.conversation import VICUNA_SYSTEM
from vica.data.processor import ViCAProcessor
from vica.data.tokenizer import load_tokenizer
from vica.utils.errors import ViCAError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def square(side: int) -> dict:
    return {"height": side, "width": side}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


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
    for length in (None, 0, -1):
        with pytest.raises(ViCAError, match=f"needs max_length from 1, got {length}"):
            processor(text="one two", truncation=True, max_length=length)


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
    """Returns CLIP's pixels: the shortest edge resized to `side`, the centre cut out."""
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


def test_cropping_does_not_first_enlarge_a_long_image(processor):
    processor.image_mode = "crop"
    with pytest.raises(ViCAError, match="900000x1 is too long to be resized to 28 pixels"):
        processor(images=Image.new("RGB", (900000, 1)))


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


def test_one_image_alone_needs_no_list(processor, tmp_path):
    picture(90, 70).save(tmp_path / "one.png")
    listed = processor.ask("What?", [tmp_path / "one.png"])
    for alone in (tmp_path / "one.png", str(tmp_path / "one.png"), picture(90, 70)):
        assert torch.equal(processor.ask("What?", alone)["pixel_values"], listed["pixel_values"])


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
    """A model that takes a ViCA model's inputs and sees no image."""

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
