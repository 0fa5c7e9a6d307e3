"""The engine answers as model.generate does, one by one, whatever else is in the batch."""

import copy
import io
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vica
from tests.builders import IMAGE, assert_close, tiny_model, tiny_vision
from tests.engines import (
    alone,
    answer,
    assert_idle,
    features,
    picture,
    request_of,
    seeing_model,
    small_engine,
    watched,
    words,
)  # fmt: skip
from vica.engine import Engine, Request
from vica.kernels.work import key_blocks
from vica.plan.layer import Drop, LayerPlan
from vica.testing import build
from vica.utils.errors import ViCAError

ENDS = [5, 17, 40, 41, 42, 80]  # ids that end an answer: frequent enough to occur


def wired(variant="accel", layers=(0, 2), rule=True, kv_heads=2, **text):
    text = dict(num_key_value_heads=kv_heads, **text)
    model = tiny_model(variant=variant, t2v_layers=list(layers), freeze_prefix=rule, text_config=text)
    model.generation_config.eos_token_id = ENDS
    return model


def rows_of(model, request: Request) -> int:
    """Returns the text tokens whose K/V the request may take."""
    visual = sum(len(x) for x in request.images) if model.config.variant == "dense" else 0
    return len(request.prompt) - len(request.images) + visual + request.max_new_tokens - 1


def bytes_of_images(model, request: Request) -> int:
    text, layers = model.config.text_config, model.config.t2v_layers
    each = text.hidden_size if model.config.variant == "dense" else 2 * text.num_key_value_heads * text.head_dim
    return 4 * each * sum(map(len, request.images)) * (1 if model.config.variant == "dense" else len(layers))


def tight_engine(model, requests, extra: float, **options) -> Engine:
    """Room for the largest request and `extra` times as much again: some must wait."""
    text = model.config.text_config
    row = 2 * 4 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers
    room = max(2, *(rows_of(model, r) for r in requests)), max(bytes_of_images(model, r) for r in requests)
    kv_bytes, image_bytes = (int((1 + extra) * x) for x in room)
    return Engine(model, kv_bytes=kv_bytes * row, image_memory_bytes=image_bytes, workers=2, **options)


def assert_answers(model, requests, results) -> None:
    for request, result in zip(requests, results):
        want = alone(model, request)
        assert result.error is None and result.tokens == want
        ended = want[-1] in ENDS and not request.ignore_eos
        assert result.finish_reason == ("stop" if ended else "length")
        assert request.result is result and result.id is request.id
        assert result.prompt_tokens == len(request.prompt) + sum(len(x) - 1 for x in request.images)


images = st.tuples(st.just("image"), st.integers(0, 7))
requests = st.builds(
    lambda parts, last, text, **options: request_of([*parts, last], text, **options),
    parts=st.lists(st.one_of(st.integers(1, 8), images, images), max_size=5).filter(
        lambda parts: sum(not isinstance(p, int) for p in parts) <= 3
    ),
    last=st.integers(1, 8),
    text=st.integers(0, 1),  # many prompts begin alike
    max_new_tokens=st.integers(1, 8),
    ignore_eos=st.booleans(),
)


@pytest.mark.slow
@settings(max_examples=100)
@given(
    asked=st.lists(requests, min_size=1, max_size=7),
    variant=st.sampled_from(["accel", "accel", "dense"]),
    layers=st.sampled_from([[], [0], [3], [0, 2], [0, 1, 2, 3]]),
    rule=st.sampled_from([True, False, 0, 2, 4]),
    kv_heads=st.sampled_from([1, 2, 4]),
    extra=st.sampled_from([0, 0.5, 2, 8]),
    max_batch=st.integers(1, 5),
    keep_prefix=st.booleans(),
    keep_images=st.booleans(),
)
def test_any_mix(asked, variant, layers, rule, kv_heads, extra, max_batch, keep_prefix, keep_images):
    model = wired(variant, layers, rule, kv_heads)
    engine = tight_engine(model, asked, extra, max_batch=max_batch, keep_prefix=keep_prefix, keep_images=keep_images)
    for again in range(2):  # the second time much is kept already
        assert_answers(model, asked, watched(engine).generate(asked if again == 0 else asked[::-1])[:: 1 - 2 * again])
    assert_idle(engine)


MIXES = {
    "one question on one image, alone": [[4, ("image", 3), 5]],
    "many questions on one image": [[6, ("image", 2), n] for n in (1, 2, 3, 4, 5, 6)],
    "the image at many places": [[n, ("image", 2), 4] for n in (1, 2, 3, 4)],
    "no prefix": [[("image", 1), 4], [("image", 1), ("image", 2), 3], [("image", 3), 2, ("image", 3), 1]],
    "one image twice": [[3, ("image", 2), 2, ("image", 2), 3]],
    "no image at all": [[1], [9], [30], [2]],
    "with and without": [[5, ("image", 3), 5], [11], [3, ("image", 1), ("image", 2), 4, ("image", 3), 2], [1]],
    "prompts of more than a tile": [[70, ("image", 3), 130], [200], [3, ("image", 0), 64], [64, ("image", 1), 1]],
    "more requests than batch slots": [[3 + n % 4, ("image", n % 3), 1 + n % 5] for n in range(17)],
}


@pytest.mark.parametrize("variant, rule", [("accel", True), ("accel", False), ("accel", 2), ("dense", True)])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_mixes(mix, variant, rule):
    model = wired(variant, rule=rule)
    asked = [request_of(parts, max_new_tokens=3 + n % 4) for n, parts in enumerate(MIXES[mix])]
    engine = watched(small_engine(model))
    assert_answers(model, asked, engine.generate(asked))
    assert_idle(engine)


@pytest.mark.parametrize("blocks", [1, 16, 200])
def test_images_of_more_than_a_chunk(blocks):
    """Keys of an image, and rows that see it, are cut into as many pieces as a device wants; each piece counts."""
    model = wired(layers=[0, 1, 2, 3])
    large = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (63, 64, 65, 200)]
    asked = [Request([*words(0, 3), IMAGE, *words(1, 2 + 40 * n)], [x], 4) for n, x in enumerate(large)]
    asked += [Request([*words(0, 3), IMAGE, *words(n, 3)], [large[3]], 2) for n in range(70)]
    asked += [Request([*words(2, 270), IMAGE, *words(3, 5)], [large[2]], 4), Request(words(4, 300), [], 4)]
    engine = small_engine(model, max_batch=80, kv_bytes=2**22)
    engine.runner.blocks_wanted = blocks
    assert_answers(model, asked, engine.generate(asked))


def test_the_last_positions():
    """An answer ends where the model's positions do; a prompt that fills them gets one token."""
    model = wired(max_position_embeddings=64)
    model.generation_config.eos_token_id = None
    asked = [request_of([n, ("image", 3), 20], max_new_tokens=9) for n in (20, 30, 33, 34)]
    results = small_engine(model).generate(asked)
    assert [len(r.tokens) for r in results] == [9, 5, 2, 1]
    for request, result in zip(asked, results):
        assert result.tokens == alone(model, request)[: len(result.tokens)] and result.finish_reason == "length"


SHAPES = [
    dict(attention_bias=True),
    dict(attention_bias=True, attention_out_bias=False, mlp_bias=True),
    dict(head_dim=16),
    dict(num_attention_heads=2, kv_heads=1, head_dim=10),
    dict(hidden_act="gelu"),
    dict(rms_norm_eps=1e-2),
    dict(tie_word_embeddings=True),
    dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e4)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_shapes(shape):
    model = wired(**shape)
    asked = [request_of([3, ("image", n), 4 + n], max_new_tokens=5) for n in range(3)]
    assert_answers(model, asked, small_engine(model).generate(asked))


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("stages", [2, 3])
def test_blocks_of_keys_fit_into_shared_memory(rows, stages):
    """float32 with heads of 128 and 256 among them; half precision up to 128 keeps what it was tuned to."""
    for narrow in (32, 128, 256):
        assert key_blocks(rows, narrow, stages) == (64, stages)
    for wide in (512, 1024):
        keys, held = key_blocks(rows, wide, stages)
        assert keys in (16, 32, 64) and 1 <= held <= stages
        assert (rows + held * 2 * keys) * wide <= 96 * 2**10
    assert key_blocks(rows, 2**20, stages) == (16, 1)


def test_prompts_as_tuples_and_numpy_integers():
    model = wired()
    request = request_of([3, ("image", 1), 4], max_new_tokens=5)
    others = [
        Request(tuple(request.prompt), request.images, 5),
        Request(list(np.array(request.prompt)), request.images, 5),
    ]
    results = small_engine(model).generate([request, *others])
    assert [r.tokens for r in results] == [alone(model, request)] * 3


@pytest.mark.parametrize("ends", [None, 70, [70, 2]])
def test_end_tokens_come_from_the_model(ends):
    model = wired()
    model.generation_config.eos_token_id = ends
    asked = [request_of([3, ("image", n), 4], max_new_tokens=12) for n in range(6)]
    results = small_engine(model).generate(asked)
    assert [r.tokens for r in results] == [alone(model, r) for r in asked]
    assert ("stop" in {r.finish_reason for r in results}) == (ends is not None)


@pytest.mark.parametrize("variant", ["accel", "dense"])
def test_in_bfloat16(variant):
    """Tokens may differ where logits are near each other; the first logits may not stray further than generate's."""
    model = wired(variant).to(torch.bfloat16)
    asked = [request_of([4, ("image", n), 5], max_new_tokens=1) for n in range(4)]
    engine = small_engine(model)
    seen = []
    choose = engine.runner._choose
    engine.runner._choose = lambda logits, *rest: seen.append(logits.clone()) or choose(logits, *rest)
    for request in asked:
        engine.generate([request])
    for request, (logits,) in zip(asked, seen):
        inputs = dict(input_ids=torch.tensor([request.prompt]), image_features=request.images)
        with torch.no_grad():
            exact = copy.deepcopy(model).float()(**inputs).logits[0, -1]
            theirs = model(**inputs | dict(image_features=[x.bfloat16() for x in request.images])).logits[0, -1]
        assert (logits.float() - exact).abs().max() < 2 * (theirs.float() - exact).abs().max() + 0.02


# --- pictures and texts ---


def test_questions_to_the_random_model():
    model, processor = build()
    engine = watched(small_engine(model, processor=processor, kv_bytes=2**25, image_memory_bytes=2**25))
    image, questions = picture(0, (200, 120)), ["What is in the picture?", "Is there a star?", "How many squares?"]
    results = engine.generate([Request.ask(q, [image], max_new_tokens=8) for q in questions])
    assert [r.tokens for r in results] == [answer(model, processor.ask(q, [image]), 8) for q in questions]
    assert_idle(engine)


SIGLIP = dict(tiny_vision(), model_type="siglip_vision_model")
TOWERS = {
    "CLIP": dict(),
    "with the class token": dict(mm_vision_select_feature="cls_patch"),
    "the last layer": dict(mm_vision_select_layer=-1),
    "an early layer": dict(mm_vision_select_layer=1, mm_projector_type="linear"),
    "another activation": dict(vision_config=tiny_vision(hidden_act="gelu", layer_norm_eps=1e-3)),
    "SigLIP": dict(vision_config=SIGLIP),
    "SigLIP's last layer": dict(vision_config=SIGLIP, mm_vision_select_layer=-1),
}


@pytest.mark.parametrize("tower", TOWERS, ids=str)
def test_towers(tower):
    model, processor = seeing_model(**TOWERS[tower])
    engine = small_engine(model, processor=processor)
    pixels = np.stack(processor.process_images([picture(n) for n in range(3)]))
    with torch.no_grad():
        want = model.get_image_features(torch.from_numpy(pixels))
        assert_close(torch.stack(engine.runner.encode(pixels)), want)
    results = engine.generate([Request.ask("What?", [picture(n)], max_new_tokens=4) for n in range(3)])
    assert [r.tokens for r in results] == [answer(model, processor.ask("What?", [picture(n)]), 4) for n in range(3)]


@pytest.mark.parametrize("variant", ["accel", "dense"])
def test_pictures_and_questions(variant, tmp_path):
    """Every way to ask gives the answer of generate to the processor's inputs."""
    model, processor = seeing_model(variant=variant)
    engine = watched(small_engine(model, processor=processor, kv_bytes=2**25, image_memory_bytes=2**25))
    image, other, options = picture(0, (200, 120)), picture(1, (50, 70)), dict(max_new_tokens=6)
    image.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    image.save(buffer, "png")
    question, system = "Is there a star?", "Answer."

    def part(source):
        return {"type": "image", "image": source}

    chat = [
        {"role": "system", "content": system},
        {"role": "user", "content": [part(image), {"type": "text", "text": question}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "text", "text": "And here?"}, part(other)]},
    ]
    bare = copy.copy(chat)
    bare[1] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    bare[3] = {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "image"}]}
    prompt = f"USER: <image>\n{question} ASSISTANT:"
    cases = [(Request.ask(question, [x], **options), processor.ask(question, [image])) for x in (
        image, tmp_path / "a.png", str(tmp_path / "a.png"), buffer.getvalue(), image.convert("RGBA"),
    )]  # fmt: skip
    cases += [(Request.ask(question, **options), processor.ask(question))]
    cases += [(Request.ask(question, [other, image], **options), processor.ask(question, [other, image]))]
    cases += [(Request(prompt, [other], **options), processor(text=prompt, images=[other]))]
    ids = processor(text=prompt, images=[other])["input_ids"][0].tolist()
    cases += [(Request(ids, [other], **options), processor(text=prompt, images=[other]))]
    chat_inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    cases += [(Request(chat, **options), chat_inputs), (Request(bare, [image, other], **options), chat_inputs)]
    results = engine.generate([request for request, _ in cases])
    for result, (_, inputs) in zip(results, cases):
        want = answer(model, inputs, 6)
        assert result.tokens == want and result.error is None
        assert result.text == processor.decode(want, skip_special_tokens=True).strip()
    assert_idle(engine)


def test_a_placeholder_of_the_vocabulary():
    """Where the placeholder is a word, it stands for an image in a prompt, and is text when the model generates it."""
    model = tiny_model(image_token_index=7)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight[7] *= 20
    asked = [Request([9, 7, 11, 12], [features(2)], 12), Request([9, 11], [], 12)]
    results = small_engine(model).generate(asked)
    assert any(7 in r.tokens for r in results)
    assert [r.tokens for r in results] == [alone(model, r) for r in asked]


# --- one model, several engines ---


def test_streams_side_by_side():
    """Two streams on one engine, and a third call within their loops."""
    model = wired()
    engine = watched(small_engine(model, max_batch=3))
    groups = [[request_of([3, ("image", n % 3), 2 + n], g, max_new_tokens=6) for n in range(7)] for g in range(2)]
    streams, got = [engine.stream(iter(group)) for group in groups], {}
    ended = [False, False]
    while not all(ended):
        for which, stream in enumerate(streams):
            request, token = next(stream, (None, None))
            if request is None:
                ended[which] = True
            else:
                assert request in groups[which]
                got.setdefault(request, []).append(token)
        if len(got) == 5:
            within = request_of([2, ("image", 1), 3], max_new_tokens=4)
            assert_answers(model, [within], engine.generate([within]))
    for group in groups:
        assert_answers(model, group, [r.result for r in group])
        assert all(got[r] == r.result.tokens for r in group)
    assert_idle(engine)


def test_one_request_twice():
    model = wired()
    request = request_of([3, ("image", 2), 4], max_new_tokens=6)
    results = small_engine(model).generate([request, request, request])
    assert [r.tokens for r in results] == [alone(model, request)] * 3
    assert request.result in results


def test_no_requests():
    engine = small_engine(wired())
    assert engine.generate([]) == [] and list(engine.stream(iter(()))) == []


def test_progress_is_shown(capsys, monkeypatch):
    """A bar on a terminal; elsewhere so short a job says nothing, and longer ones are told in lines."""
    engine = small_engine(wired())
    engine.generate([request_of([3])], progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    engine.generate([request_of([3])], progress=True)
    assert "1/1" in capsys.readouterr().err


def test_a_second_engine_on_a_rewired_model():
    """Fused weights are fused once; an engine keeps the wiring that it was made with."""
    model = wired()
    asked = [request_of([3, ("image", n), 4], max_new_tokens=5) for n in range(4)]
    accel = small_engine(model)
    weights = accel.runner.decoder.layers[0].qkv.data_ptr()
    want = [alone(model, r) for r in asked]
    model.set_variant("dense")
    dense = small_engine(model)
    assert dense.runner.decoder.layers[0].qkv.data_ptr() == weights
    assert_answers(model, asked, dense.generate(asked))
    assert [r.tokens for r in accel.generate(asked)] == want
    model.set_variant("mask")
    assert [alone(model, r) for r in asked] == want


def test_a_model_that_has_an_engine_is_saved_whole(tmp_path):
    model, processor = seeing_model()
    inputs = processor.ask("Yes?", [picture()])
    with torch.no_grad():
        want = model(**inputs).logits
    engine = small_engine(model, processor=processor)
    engine.generate([Request.ask("Yes?", [picture()], max_new_tokens=2)])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = vica.ViCAForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(again(**inputs).logits, want)
    copied = copy.deepcopy(model)
    del model, engine
    with torch.no_grad():
        assert torch.equal(copied(**inputs).logits, want)


def test_a_caller_in_inference_mode():
    model = wired()
    asked = [request_of([3, ("image", n), 4], max_new_tokens=4) for n in range(3)]
    want = [alone(model, r) for r in asked]
    with torch.inference_mode():
        engine = small_engine(model)
        assert [r.tokens for r in engine.generate(asked)] == want
    assert [r.tokens for r in engine.generate(asked)] == want, "and outside of it again"
    images = [x.clone().requires_grad_() for r in asked for x in r.images]
    assert [r.tokens for r in engine.generate([Request(r.prompt, [x], 4) for r, x in zip(asked, images)])] == want
    loss = model(torch.tensor([asked[0].prompt]), image_features=asked[0].images).logits.sum()
    loss.backward()  # the model can still be trained


class Adapter(torch.nn.Linear):
    """Stands for LoRA's layers: its weight is not all that it computes."""


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "up_proj", "down_proj", "lm_head", "tower"])
def test_adapters_are_refused(name):
    model, _ = seeing_model()
    block = model.model.layers[1]
    place = dict(q_proj=block.self_attn, o_proj=block.self_attn, up_proj=block.mlp, down_proj=block.mlp, lm_head=model)
    if name == "tower":
        place, name = model.model.vision_tower.vision_tower.vision_model.encoder.layers[0].self_attn, "k_proj"
    else:
        place = place[name]
    plain = getattr(place, name)
    setattr(place, name, Adapter(plain.in_features, plain.out_features, plain.bias is not None))
    with pytest.raises(ViCAError, match="plain linear layers, this model has Adapter: merge"):
        small_engine(model)


def test_mask_is_refused():
    with pytest.raises(ViCAError, match="variants accel and dense, not 'mask'"):
        Engine(tiny_model(variant="mask"))


UNEVEN_PLANS = {
    "updates and reads": [LayerPlan(), LayerPlan("read"), LayerPlan(), LayerPlan("read")],
    "reads first, then updates": [LayerPlan("skip"), LayerPlan("read"), LayerPlan(), LayerPlan()],
    "a drop of all": [LayerPlan(), LayerPlan(), LayerPlan("skip", drop=Drop(0)), LayerPlan("skip")],
    "a drop of half": [LayerPlan(), LayerPlan(), LayerPlan(drop=Drop(0.5, "previous")), LayerPlan()],
    "text that reads no updated tokens": [LayerPlan(text_reads=False), LayerPlan(), LayerPlan(), LayerPlan()],
}


@pytest.mark.parametrize("plan", UNEVEN_PLANS)
def test_plans_with_uneven_visual_tokens_are_refused(plan):
    """In one line, whatever the config's variant; only the first layer's entry looks uniform in some."""
    for variant in ("accel", "dense"):
        model = tiny_model(variant=variant)
        model.config.plan = UNEVEN_PLANS[plan]
        with pytest.raises(ViCAError, match="same visual tokens in every layer.*: use model.generate$") as error:
            Engine(model)
        assert "\n" not in str(error.value)


def test_a_plan_that_is_no_variant_is_answered():
    """Frozen in all layers, and read where no list of T2V layers says so."""
    plan = [LayerPlan("skip"), LayerPlan("read", prefix_attends=False), LayerPlan("read", text_reads=False)]
    model = wired()
    model.config.plan = [*plan, LayerPlan("read")]
    asked = [request_of([3, ("image", n), 4], max_new_tokens=5) for n in range(3)]
    engine = small_engine(model)
    assert engine.runner.decoder.image_layers == [1, 3]
    assert_answers(model, asked, engine.generate(asked))


@pytest.mark.parametrize(
    "options, complaint",
    [
        (dict(max_batch=0), "max_batch is 0"),
        (dict(max_batch=2.0), "max_batch is 2.0"),
        (dict(kv_bytes=-5), "kv_bytes is -5"),
        (dict(kv_bytes=100), "100 bytes for text K/V hold no token; one takes 512"),
        (dict(image_memory_bytes="1GB"), "image_memory_bytes is '1GB'"),
    ],
    ids=str,
)
def test_invalid_limits_are_refused(options, complaint):
    with pytest.raises(ViCAError, match=complaint):
        Engine(tiny_model(), **options)


def test_a_single_image_needs_no_list(tmp_path):
    path = tmp_path / "one.png"
    picture(3).save(path)
    content = path.read_bytes()
    for alone_image in (str(path), path, content, picture(3), np.asarray(picture(3)), features(1), io.BytesIO(content)):
        for images in (alone_image, [alone_image], (alone_image,)):
            asked = Request.ask("What?", images)
            assert len(asked.images) == 1 and asked.images[0] is alone_image
    assert Request.ask("What?").images == Request.ask("What?", None).images == []
    assert len(Request.ask("What?", torch.zeros(3, 4, 32)).images) == 3
