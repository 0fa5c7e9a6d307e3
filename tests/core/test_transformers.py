"""The stock tools work on what we save: AutoProcessor, the pipeline, transformers' own LLaVA after conversion."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    TextStreamer,
    pipeline,
)

import vica
from tests.builders import assert_close
from vica.testing import build_config, build_tokenizer, save

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture
def picture():
    return Image.linear_gradient("L").convert("RGB").resize((200, 120))


def messages(picture):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def our_answer(folder, picture, **generation) -> str:
    model, processor = vica.load(folder, device="cpu")
    inputs = processor.apply_chat_template(
        messages(picture), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**inputs, **generation)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_pipeline(folder, picture):
    options = dict(max_new_tokens=6, do_sample=False)
    run = pipeline("image-text-to-text", model=str(folder), device="cpu")
    assert isinstance(run.model, vica.ViCAForConditionalGeneration) and isinstance(run.processor, vica.ViCAProcessor)
    want = our_answer(folder, picture, **options)
    chat = run(text=messages(picture), return_full_text=False, generate_kwargs=options)
    assert chat[0]["generated_text"] == want
    prompt = run.processor.apply_chat_template(messages(picture), add_generation_prompt=True)
    plain = run(images=picture, text=prompt, return_full_text=False, generate_kwargs=options)
    assert plain[0]["generated_text"] == want


def test_auto_classes(folder, picture):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=f"<image>\n{QUESTION}", images=picture)
    with torch.no_grad():
        assert model(**inputs).logits.shape == (*inputs["input_ids"].shape, 400)


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=True, temperature=0.7, top_p=0.9),
        dict(do_sample=False, repetition_penalty=1.3),
        dict(do_sample=False, no_repeat_ngram_size=2),
        dict(do_sample=False, use_cache=False),
        dict(do_sample=True, num_return_sequences=3),
        dict(num_beams=2, num_return_sequences=2),
        dict(stop_strings=[";"]),
        dict(stop_strings=["What is in the picture that was there?"]),  # longer than what follows the picture
    ],
    ids=str,
)
def test_every_way_to_generate(folder, picture, options):
    model, processor = vica.load(folder, device="cpu")
    inputs = processor(text=[f"<image>\n{QUESTION}", "No picture here."], images=[[picture], []], padding_side="left")
    if "stop_strings" in options:
        options = {**options, "tokenizer": processor.tokenizer}
    results = []
    for variant in ("accel", "mask"):
        model.set_variant(variant)
        torch.manual_seed(0)
        results.append(model.generate(**inputs, max_new_tokens=5, pad_token_id=3, **options))
    assert torch.equal(*results)
    if options.get("use_cache") is False:
        cached = model.generate(**inputs, max_new_tokens=5, pad_token_id=3, do_sample=False)
        assert torch.equal(results[0], cached)


def test_assisted_generation_is_refused_before_anything_runs(folder, picture):
    model, processor = vica.load(folder, device="cpu")
    with pytest.raises(vica.ViCAError, match="assisted generation .* is not supported"):
        model.generate(**processor.ask(QUESTION, [picture]), prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("to", ["llava", "hf", "vica"])
def test_vicunas_generation_config_is_kept(folder, tmp_path, to):
    """It names a temperature without do_sample, which transformers does not write anew."""
    settings = dict(_from_model_config=True, eos_token_id=2, max_length=4096, temperature=0.9, top_p=0.6)
    shutil.copytree(folder, tmp_path / "source")
    (tmp_path / "source/generation_config.json").write_text(json.dumps(settings | {"transformers_version": "4.31.0"}))
    vica.loading.convert(tmp_path / "source", tmp_path / "out", to)
    model, _ = vica.load(tmp_path / "source", device="cpu")
    model.save_pretrained(tmp_path / "saved")
    assert settings.items() <= json.loads((tmp_path / "out/generation_config.json").read_text()).items()
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["max_length"] == 4096
    assert model.generation_config.temperature == 0.9


def test_converted_to_hf_it_is_transformers_llava(folder, picture, tmp_path):
    """Model, tokenizer and processor: the same question through transformers alone."""
    vica.convert(folder, tmp_path / "hf", "hf")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    their_inputs = AutoProcessor.from_pretrained(tmp_path / "hf")(
        images=picture, text=f"USER: <image>\n{QUESTION} ASSISTANT:", return_tensors="pt"
    )
    model, processor = vica.load(tmp_path / "hf", variant="dense", device="cpu")
    inputs = processor(images=picture, text=f"USER: <image>\n{QUESTION} ASSISTANT:")
    assert processor.image_token_index == model.config.image_token_index == theirs.config.image_token_id
    with torch.no_grad():
        want, got = theirs(**their_inputs).logits[:, -5:], model(**inputs).logits[:, -5:]
    assert_close(got, want)
    vica.convert(tmp_path / "hf", tmp_path / "back", "vica")
    again, its_processor = vica.load(tmp_path / "back", device="cpu")
    assert again.config.t2v_layers == [0, 3] and its_processor.conversation == "vicuna_v1"
    assert (
        its_processor(text="<image>\nhello")["input_ids"].tolist()
        == processor(text="<image>\nhello")["input_ids"].tolist()
    )


def test_the_placeholder_in_hf_is_the_tokenizers_own(tmp_path):
    """Where the vocabulary is larger than the tokenizer, as in padded checkpoints, its free ids are used."""
    config = build_config()
    config.text_config.vocab_size = 448
    vica.ViCAForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    vica.ViCAProcessor.from_config(config, build_tokenizer()).save_pretrained(tmp_path / "m")
    vica.convert(tmp_path / "m", tmp_path / "hf", "hf")
    model, processor = vica.load(tmp_path / "hf", device="cpu")
    assert model.config.image_token_index == processor.tokenizer.convert_tokens_to_ids("<image>") == 400
    assert model.config.text_config.vocab_size == 448


def test_streamers_of_transformers_take_prompts_with_images(folder, picture, capsys):
    model, processor = vica.load(folder, device="cpu")
    inputs = processor.ask(QUESTION, [picture])
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False, streamer=TextStreamer(processor.tokenizer))
    printed = capsys.readouterr().out
    assert QUESTION in printed and printed.strip().endswith(processor.decode(out[0, -3:]).strip())


def test_processors_see_only_words_of_the_prompt(folder, picture):
    """A placeholder is no token: the repetition penalty must not count it as one."""
    model, processor = vica.load(folder, device="cpu")
    options = dict(max_new_tokens=1, output_scores=True, output_logits=True, return_dict_in_generate=True)
    inputs = processor.ask(QUESTION, [picture])
    out = model.generate(**inputs, repetition_penalty=5.0, do_sample=False, **options)
    words = torch.zeros(400, dtype=torch.bool)
    words[inputs["input_ids"][inputs["input_ids"] >= 0]] = True
    changed = out.scores[0][0] != out.logits[0][0]
    assert torch.equal(changed, words & (out.logits[0][0] != 0))


def test_a_saved_image_processor_is_obeyed(folder, picture, tmp_path):
    vica.convert(folder, tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "processor_config.json"
    saved = json.loads(path.read_text())
    saved["image_processor"] |= dict(image_mean=[0.5] * 3, image_std=[0.25] * 3, do_pad=False)
    path.write_text(json.dumps(saved))
    processor = vica.load(tmp_path / "hf", device="cpu")[1]
    assert processor.image_mode == "crop" and list(processor.image_processor.image_mean) == [0.5] * 3


def test_a_placeholder_that_the_model_utters_is_text(folder, picture, tmp_path):
    """In the hf layout the placeholder is a word. transformers embeds it like any other, and so do we."""
    vica.convert(folder, tmp_path / "hf", "hf")
    model, processor = vica.load(tmp_path / "hf", device="cpu")
    with torch.no_grad():
        model.lm_head.weight[model.config.image_token_index] = 1e3 * model.lm_head.weight.abs().mean()
    for beams in (1, 2):
        out = model.generate(**processor.ask(QUESTION, [picture]), max_new_tokens=4, num_beams=beams, do_sample=False)
        assert out.shape[1] > 4
