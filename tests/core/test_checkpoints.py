"""Reading and writing the three layouts. The folders are made here in each layout's own key names."""

import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import vica
from tests.builders import VOCAB, Row, assert_close, batch, image, tiny_model, tiny_vision
from vica import testing as toy
from vica.checkpoint.source import Source
from vica.loading import check_device
from vica.plan import formats
from vica.plan.wiring import Wiring

LAYERS = [0, 2]
load = partial(vica.load, device="cpu")
TOWER = "model.vision_tower.vision_tower.vision_model."
FLAT = dict(
    model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"], hidden_size=32, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=VOCAB, max_position_embeddings=512,
    rms_norm_eps=1e-5, rope_scaling=None, hidden_act="silu", tie_word_embeddings=False, torch_dtype="float32",
    mm_projector_type="mlp2x_gelu", mm_hidden_size=24, mm_vision_select_layer=-2, mm_vision_select_feature="patch",
    mm_use_im_start_end=False, mm_use_im_patch_token=False, image_aspect_ratio="pad", tune_mm_mlp_adapter=False,
    freeze_mm_mlp_adapter=False, use_mm_proj=True, tokenizer_model_max_length=2048, unfreeze_mm_vision_tower=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def original():
    return tiny_model(vision_config=tiny_vision(), t2v_layers=LAYERS, text_config=dict(rms_norm_eps=1e-5))


@pytest.fixture(scope="module")
def weights(original):
    return {k: v.clone() for k, v in original.state_dict().items()}


def logits(model) -> torch.Tensor:
    inputs = batch([Row((3, image(4), 5)), Row((2,), 1)])
    inputs["image_features"] = None
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(**{k: v for k, v in inputs.items() if v is not None}, pixel_values=pixels).logits


def write_tower(folder: Path, weights) -> Path:
    tower = CLIPVisionModel(CLIPVisionConfig(**tiny_vision()))
    inside = {k.removeprefix(TOWER): v for k, v in weights.items() if k.startswith(TOWER)}
    tower.load_state_dict({k: inside[k.removeprefix("vision_model.")] for k in tower.state_dict()}, strict=True)
    tower.save_pretrained(folder)
    return folder


def write_llava(folder: Path, weights, form="safetensors", tower="inside", **config) -> Path:
    """LLaVA's layout: sharded, with the harmless buffers that old files carry."""
    folder.mkdir(parents=True)
    weights = dict(weights)
    for i in range(4):
        weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    settings = {**FLAT, **config}
    if tower == "inside":
        weights[TOWER + "embeddings.position_ids"] = torch.arange(17)[None]
        settings["vision_config"] = tiny_vision()
    else:
        weights = {k: v for k, v in weights.items() if not k.startswith(TOWER)}
        settings["mm_vision_tower"] = str(tower)
    (folder / "config.json").write_text(json.dumps(settings))
    if form == "safetensors":
        save_torch_state_dict(weights, folder, max_shard_size="20KB")
    elif form == "bin shards":
        names = sorted(weights)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, keys in parts.items():
            torch.save({k: weights[k] for k in keys}, folder / file)
        index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form != "legacy bin")
    return folder


HF_CONFIG = dict(
    text_config=LlamaConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                            intermediate_size=48, vocab_size=VOCAB, max_position_embeddings=512, rms_norm_eps=1e-5),
    vision_config=CLIPVisionConfig(**tiny_vision()), image_token_index=VOCAB - 1, image_seq_length=16,
)  # fmt: skip


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin shards", "bin", "legacy bin"])
@pytest.mark.parametrize("tower", ["inside", "apart"])
def test_llava_layout(tmp_path, original, weights, form, tower):
    where = "inside" if tower == "inside" else write_tower(tmp_path / "tower", weights)
    model, processor = load(write_llava(tmp_path / "m", weights, form, where), t2v_layers=LAYERS)
    assert processor is None
    assert same(model.state_dict(), weights)
    assert torch.equal(logits(model), logits(original))


def test_a_tower_in_a_cache_of_the_callers(tmp_path, weights):
    place = tmp_path / "cache" / "models--someone--tower"
    write_tower(place / "snapshots" / "1", weights)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("1")
    model, _ = load(
        write_llava(tmp_path / "m", weights, tower="someone/tower"), t2v_layers=LAYERS, cache_dir=tmp_path / "cache"
    )
    assert same(model.state_dict(), weights)


@pytest.mark.parametrize("keys", ["as transformers saves", "old", "in memory"])
def test_hf_layout(tmp_path, keys):
    theirs = LlavaForConditionalGeneration(LlavaConfig(**HF_CONFIG)).eval()
    theirs.save_pretrained(tmp_path)
    if keys != "as transformers saves":
        state = theirs.state_dict()
        if keys == "old":
            state = {old_hf_name(k): v for k, v in state.items()}
            assert "language_model.model.embed_tokens.weight" in state
            assert "vision_tower.vision_model.embeddings.class_embedding" in state
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    model, _ = load(tmp_path, variant="dense")
    ids = torch.tensor([[5, 6, VOCAB - 1, 7, 8]])
    pixels = torch.randn(1, 3, 28, 28)
    full = torch.tensor([[5, 6] + [VOCAB - 1] * 16 + [7, 8]])
    with torch.no_grad():
        want = theirs(full, pixel_values=pixels).logits[:, -2:]
        assert_close(model(ids, pixel_values=pixels).logits[:, -2:], want)


def old_hf_name(key: str) -> str:
    key = key.removeprefix("model.")
    key = key.replace("vision_tower.", "vision_tower.vision_model.") if "vision_model." not in key else key
    key = key.replace("language_model.", "language_model.model.")
    return "language_model." + key if key.startswith("lm_head") else key


@pytest.mark.parametrize("variant", ["accel", "mask", "dense"])
def test_our_layout_is_bit_equal_in_every_variant(tmp_path, original, weights, variant):
    original.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2, "written in shards"
    model, _ = load(tmp_path, variant=variant)
    assert same(model.state_dict(), weights)
    assert (model.config.t2v_layers, model.config.freeze_prefix, model.config.variant) == (LAYERS, True, variant)
    original.set_variant(variant)
    assert torch.equal(logits(model), logits(original))
    original.set_variant("accel")


def test_saved_names_and_settings_are_llavas(tmp_path, original):
    """Finds what LLaVA's loader looks for: flat fields, its key names, the tower under vision_tower.vision_tower."""
    original.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name in (
        "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.mm_projector.0.weight",
        "model.mm_projector.2.bias", TOWER + "embeddings.class_embedding", "lm_head.weight", "model.norm.weight",
    ):  # fmt: skip
        assert name in saved
    settings = json.loads((tmp_path / "config.json").read_text())
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "mm_projector_type",
        "mm_hidden_size",
        "rms_norm_eps",
    ):
        assert settings[key] == FLAT[key], key
    assert settings["rope_theta"] == 10000.0 and settings["rope_scaling"] is None
    assert "mm_vision_tower" not in settings, "LLaVA asks for the key, not for its value"
    assert settings["mm_use_im_patch_token"] is False, "else LLaVA adds a token"
    assert settings["unfreeze_mm_vision_tower"] is True, "else LLaVA does not read the tower inside"
    assert settings["t2v_layers"] == LAYERS and settings["model_type"] == "vica"


def test_auto_class_reads_our_layout(tmp_path, original, weights):
    original.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(model, vica.ViCAForConditionalGeneration) and same(model.state_dict(), weights)


@pytest.mark.parametrize("bias", [True, False])
def test_tied_and_biased_backbones_round_trip(tmp_path, bias):
    text = dict(tie_word_embeddings=True, attention_bias=bias, attention_out_bias=False)
    model = tiny_model(text_config=text, freeze_prefix=3)
    model.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert same(again.state_dict(), model.state_dict())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.config.text_config.attention_out_bias is False and again.config.freeze_prefix == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(tmp_path, original, dtype):
    original.save_pretrained(tmp_path)
    assert load(tmp_path, dtype=dtype)[0].dtype == dtype
    assert load(tmp_path)[0].dtype == torch.float32


def test_stage_one_projector_loads_alone(tmp_path, original):
    given = {f"model.mm_projector.{k}": v for k, v in original.model.mm_projector.state_dict().items()}
    torch.save(given, tmp_path / "mm_projector.bin")
    other = tiny_model(seed=9, vision_config=tiny_vision())
    other.load_projector(tmp_path)
    assert same(other.model.mm_projector.state_dict(), original.model.mm_projector.state_dict())
    torch.save({"model.mm_projector.0.weight": torch.ones(2, 2)}, tmp_path / "mm_projector.bin")
    with pytest.raises(vica.ViCAError, match="does not fit the model's projector"):
        other.load_projector(tmp_path)


# --- which layers -------------------------------------------------------------------------------------------------


def test_layers_come_from_argument_then_environment_then_config(tmp_path, original, monkeypatch):
    original.save_pretrained(tmp_path)
    assert load(tmp_path)[0].config.t2v_layers == LAYERS
    monkeypatch.setenv("T2V_LAYERS", "[3, 1]")
    assert load(tmp_path)[0].config.t2v_layers == [1, 3]
    assert load(tmp_path, t2v_layers=[])[0].config.t2v_layers == []


def test_a_released_checkpoint_without_layers_names_the_published_lists(tmp_path, weights):
    folder = write_llava(tmp_path / "m", weights)
    with pytest.raises(vica.ViCAError, match=r"\[0, 1, 7, 8, 9, 10, 11, 14\]"):
        load(folder)
    assert load(folder, variant="dense")[0].config.variant == "dense"


@pytest.mark.parametrize("value", ["[0,99]", "[0,0]", '"abc"', "abc", "[1.5]", "[-1]", "[true]", "{}", "7"])
def test_bad_layers_name_the_value_and_the_range(tmp_path, original, monkeypatch, value):
    original.save_pretrained(tmp_path)
    monkeypatch.setenv("T2V_LAYERS", value)
    with pytest.raises(vica.ViCAError) as error:
        load(tmp_path)
    assert repr(value) in str(error.value) and "from 0 to 3" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [dict(t2v_layers=[9]), dict(freeze_prefix=5), dict(freeze_prefix="yes"), dict(variant="fast")]
)
def test_bad_settings_are_refused_by_the_config(change):
    with pytest.raises(vica.ViCAError, match="|".join(change)):
        vica.ViCAConfig(text_config=dict(num_hidden_layers=4), **{"t2v_layers": [0], **change})


# --- conversion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["llava", "hf", "vica"])
@pytest.mark.parametrize("target", ["llava", "hf", "vica"])
def test_conversion_keeps_every_weight(tmp_path, original, weights, source, target):
    first = tmp_path / source
    if source == "hf":
        LlavaForConditionalGeneration(LlavaConfig(**HF_CONFIG)).save_pretrained(first)
    elif source == "llava":
        write_llava(first, weights)
    else:
        original.save_pretrained(first)
    vica.convert(first, tmp_path / "out", target, t2v_layers=LAYERS, freeze_prefix=False)
    before, _ = load(first, t2v_layers=LAYERS, freeze_prefix=False)
    after, _ = load(tmp_path / "out")
    assert (after.config.t2v_layers, after.config.freeze_prefix) == (LAYERS, False)
    rows = before.config.text_config.vocab_size
    for name, tensor in after.state_dict().items():
        kept = tensor[:rows] if name in ("lm_head.weight", "model.embed_tokens.weight") else tensor
        assert torch.equal(kept, before.state_dict()[name]), name
    padded = target == "hf" and source != "hf"
    assert len(after.lm_head.weight) == (128 if padded else VOCAB)
    assert after.config.image_token_index == (VOCAB if padded else before.config.image_token_index)


def test_transformers_reads_what_we_convert(tmp_path, original):
    original.save_pretrained(tmp_path / "ours")
    vica.convert(tmp_path / "ours", tmp_path / "hf", "hf")
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    original.set_variant("dense")
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        want = theirs(torch.tensor([[5] + [VOCAB] * 16 + [7, 8]]), pixel_values=pixels).logits[:, -2:, :VOCAB]
        got = original(torch.tensor([[5, vica.IMAGE_TOKEN_INDEX, 7, 8]]), pixel_values=pixels).logits[:, -2:]
    original.set_variant("accel")
    assert_close(got, want)


def test_conversion_overwrites_nothing_and_leaves_nothing_half_done(tmp_path, original):
    original.save_pretrained(tmp_path / "m")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(vica.ViCAError, match="nothing is overwritten"):
        vica.convert(tmp_path / "m", tmp_path / "full", "llava")
    linear = tiny_model(mm_projector_type="linear", vision_config=tiny_vision())
    linear.save_pretrained(tmp_path / "linear")
    with pytest.raises(vica.ViCAError, match="mlp2x_gelu"):
        vica.convert(tmp_path / "linear", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


# --- damage -------------------------------------------------------------------------------------------------------


def fails(folder, match: str) -> None:
    with pytest.raises(vica.ViCAError, match=match) as error:
        load(folder, t2v_layers=LAYERS)
    assert "\n" not in str(error.value)


def test_a_wrong_key_a_missing_key_and_a_wrong_shape_are_named(tmp_path, weights):
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = {("model.layers.1.mlp.upward.weight" if k == name else k): v for k, v in weights.items()}
    fails(write_llava(tmp_path / "a", wrong), rf"missing: {name}.*not of this model: model.layers.1.mlp.upward.weight")
    short = {k: v[:-1].clone() if k == name else v for k, v in weights.items()}
    fails(write_llava(tmp_path / "b", short), rf"of another shape: {name} is \[47, 32\], not \[48, 32\]")


def test_a_missing_shard_is_named(tmp_path, weights):
    folder = write_llava(tmp_path / "m", weights)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    fails(folder, f"names files that are not there: {lost.name}")


@pytest.mark.parametrize("form", ["safetensors", "bin", "legacy bin"])
def test_a_truncated_file_is_named(tmp_path, weights, form):
    folder = write_llava(tmp_path / "m", weights, form)
    file = sorted(folder.glob("*.safetensors" if form == "safetensors" else "*.bin"))[0]
    file.write_bytes(file.read_bytes()[:-300])
    fails(folder, f"{file.name} is (damaged|refused)")


class Malice:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize("write", [torch.save, lambda x, f: f.write_bytes(pickle.dumps(x))], ids=["torch", "pickle"])
def test_a_pickle_with_code_in_it_is_refused(tmp_path, weights, write):
    folder = write_llava(tmp_path / "m", weights, "bin")
    write({"model.embed_tokens.weight": Malice()}, folder / "pytorch_model.bin")
    fails(folder, "pytorch_model.bin is refused")


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(model_type="llava_mpt"), "llava_mpt"),
        (dict(mm_use_im_start_end=True), "mm_use_im_start_end"),
        (dict(image_aspect_ratio="anyres"), "anyres"),
        (dict(mm_projector_type="qformer"), "qformer"),
        (dict(sliding_window=128), "sliding_window is 128"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path, weights, changes, match):
    fails(write_llava(tmp_path / "m", weights, **changes), match)


def test_no_folder_no_config_no_weights_no_json(tmp_path, original):
    fails(tmp_path / "nowhere", "nowhere is no folder")
    fails(tmp_path, "holds no config.json")
    (tmp_path / "config.json").write_text(json.dumps({**FLAT, "vision_config": tiny_vision()}))
    fails(tmp_path, "holds no weights")
    (tmp_path / "mm_projector.bin").touch()
    fails(tmp_path, "stage 1's projector alone: give it to stage 2 by --pretrain_mm_mlp_adapter")
    (tmp_path / "config.json").write_text("{")
    fails(tmp_path, "cannot be read as JSON")
    fails("someone/some-model", "cannot be had from the hub")


def test_no_such_device_or_dtype(tmp_path, original):
    original.save_pretrained(tmp_path)
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(vica.ViCAError, match="CUDA"):
        vica.load(tmp_path, device=absent)
    with pytest.raises(vica.ViCAError, match="dtype is 'int8'"):
        load(tmp_path, dtype="int8")
    assert check_device("cpu").type == "cpu"


ROPES = {
    "linear": (dict(rope_type="linear", rope_theta=5e4, factor=2.0), dict(type="linear", factor=2.0)),
    "yarn": (dict(rope_type="yarn", rope_theta=5e4, factor=2.0), dict(rope_type="yarn", factor=2.0)),
}


@pytest.mark.parametrize("to", ["llava", "hf", "vica"])
@pytest.mark.parametrize("rope", ROPES)
def test_scaled_positions_survive_in_the_form_that_old_readers_know(tmp_path, rope, to):
    ours, old = ROPES[rope]
    text = dict(rope_parameters=dict(ours, original_max_position_embeddings=256) if rope == "yarn" else ours)
    model = tiny_model(vision_config=tiny_vision(), text_config=text)
    model.save_pretrained(tmp_path / "m")
    vica.convert(tmp_path / "m", tmp_path / "out", to)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    written = written["text_config"] if to == "hf" else written
    assert written["rope_theta"] == 5e4 and old.items() <= written["rope_scaling"].items()
    assert "rope_parameters" not in written
    again, _ = load(tmp_path / "out")
    pixels = torch.randn(1, 3, 28, 28)
    ids = lambda m: torch.tensor([[5, m.config.image_token_index, 7, 8]])  # noqa: E731
    with torch.no_grad():
        want, got = model(ids(model), pixel_values=pixels).logits, again(ids(again), pixel_values=pixels).logits
    assert torch.equal(got[..., :VOCAB], want)


def test_a_known_tower_is_named_for_llava():
    sizes = formats.KNOWN_TOWERS["openai/clip-vit-large-patch14-336"]
    config = vica.ViCAConfig(text_config=dict(num_hidden_layers=2), t2v_layers=[0], vision_config=sizes)
    assert formats.llava_config(config)["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"


@pytest.mark.parametrize("model_type", ["llava", "llava_llama", "llava_mistral", "llava_qwen"])
def test_every_model_type_that_llava_wrote(tmp_path, weights, model_type):
    shape = {"hidden_size": 32, "rope_theta": 1e4, "sliding_window": None}
    config = {**FLAT, **shape, "model_type": model_type, "vision_config": tiny_vision()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = Source.at(tmp_path).config(Wiring(t2v_layers=LAYERS))
    text = read.text_config
    assert (text.attention_bias, text.attention_out_bias) == (("qwen" in model_type), False)
    assert text.num_key_value_heads == 2 and text.hidden_size == 32


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14-336", "/mine/clip-vit-large-patch14-336", ["x", "y"]])
def test_forms_of_the_towers_name(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({**FLAT, "mm_vision_tower": name}))
    if isinstance(name, list):
        fails_to_read = pytest.raises(vica.ViCAError, match="the vision tower 'x' that the checkpoint names")
        with fails_to_read:
            Source.at(tmp_path).config(Wiring(t2v_layers=LAYERS))
    else:
        config = Source.at(tmp_path).config(Wiring(t2v_layers=LAYERS))
        assert (config.vision_config.image_size, config.mm_hidden_size) == (336, 1024)


def test_hub_arguments_reach_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **kwargs: asked.append(kwargs) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vica.load("someone/model", revision="v1", token="t", cache_dir="c")
    assert {k: asked[0][k] for k in ("revision", "token", "cache_dir")} == dict(revision="v1", token="t", cache_dir="c")
    with pytest.raises(vica.ViCAError, match="subfolder"):
        vica.load(Path(__file__).parent, subfolder="x")


@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_settings_are_named(tmp_path, name, content):
    toy.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(vica.ViCAError) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_cut_anywhere_is_damaged(tmp_path, weights):
    folder = write_llava(tmp_path / "m", {k: v for k, v in weights.items() if "norm" in k}, "legacy bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    for length in [0, 1, 10, *range(50, len(whole) - 1, len(whole) // 25)]:
        (folder / "pytorch_model.bin").write_bytes(whole[:length])
        fails(folder, "pytorch_model.bin is (damaged|refused)")


def test_a_file_of_configs_goes_before_the_environment(tmp_path, original, monkeypatch):
    original.save_pretrained(tmp_path / "m")
    (tmp_path / "recipe.json").write_text(json.dumps(dict(t2v_layers=[3], freeze_prefix=False)))
    monkeypatch.setenv("T2V_LAYERS", "[1]")
    config = load(tmp_path / "m", recipe=tmp_path / "recipe.json")[0].config
    assert (config.t2v_layers, config.freeze_prefix) == ([3], False)


def test_conversion_touches_nothing_beside_its_target(tmp_path, original):
    original.save_pretrained(tmp_path / "m")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("keep")
    vica.convert(tmp_path / "m", tmp_path / "out", "llava")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out", "out.partial"]
    assert (tmp_path / "out.partial" / "mine").read_text() == "keep"
