"""The image memory as a file: saved and loaded, and refused where it is damaged or means nothing."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import vica
from tests.engines import (
    FEATURE,
    KV,
    QUESTIONS,
    ask,
    assert_idle,
    counting,
    picture,
    seeing_model,
)  # fmt: skip
from vica.data.processor import ViCAProcessor
from vica.engine import Engine, Request
from vica.utils.errors import ViCAError


@pytest.fixture(scope="module")
def seeing():
    return seeing_model()


def held(memory) -> dict:
    return {name: entry.tensor for name, entry in memory.entries.items()}


@pytest.mark.parametrize("variant", ["accel", "dense"])
def test_saved_and_loaded(variant, tmp_path):
    model, processor = seeing_model(variant=variant)
    pairs = [(q, [picture(n)]) for n, q in enumerate(QUESTIONS[:3])] + [("Both?", [picture(0), picture(1)])]
    engine = counting(model, processor)
    ask(engine, *pairs)
    assert engine.image_memory.save(tmp_path / "corpus") == 3
    assert os.listdir(tmp_path) == ["corpus"]
    with safe_open(tmp_path / "corpus", "pt") as file:
        for (key, start), tensor in held(engine.image_memory).items():
            assert torch.equal(file.get_tensor(f"{key}@{start}"), tensor)
        assert len(file.keys()) == len(engine.image_memory.entries)
    other = counting(*seeing_model(variant=variant))
    other.image_memory.load(tmp_path / "corpus")
    assert list(other.image_memory.entries) == list(engine.image_memory.entries), "in order of use"
    assert other.image_memory.bytes == engine.image_memory.bytes
    ask(other, *pairs)
    assert other.seen == other.rows == other.image_memory.misses == 0
    ask(other, ("Elsewhere?", [picture(2), picture(1), picture(0)]))
    assert other.seen == 0
    ask(other, ("New?", [picture(9)]))
    assert other.seen == 1
    assert_idle(other)


def test_known_files_are_not_decoded(seeing, tmp_path, monkeypatch):
    """A corpus that was encoded once: its files are read, to know them, and no more."""
    engine = counting(*seeing)
    picture().save(tmp_path / "a.png")
    ask(engine, ("What?", [tmp_path / "a.png"]))
    engine.image_memory.save(tmp_path / "corpus")
    other = counting(*seeing)
    assert other.image_memory.load(tmp_path / "corpus") == 1
    monkeypatch.setattr(ViCAProcessor, "process_images", None)
    results = other.generate([Request.ask(q, [tmp_path / "a.png"]) for q in QUESTIONS])
    assert not any(r.error for r in results) and other.seen == 0


def test_loaded_entries_count_as_less_recently_used(seeing, tmp_path):
    engine = counting(*seeing)
    for seed in range(3):
        ask(engine, ("What?", [picture(seed)]))
    engine.image_memory.save(tmp_path / "corpus")
    other = counting(*seeing, image_memory_bytes=2 * (KV + FEATURE))
    ask(other, ("What?", [picture(7)]))
    mine = list(other.image_memory.entries)
    assert other.image_memory.load(tmp_path / "corpus") == 1, "there is room for one more"
    assert list(other.image_memory.entries) == list(engine.image_memory.entries)[-2:] + mine
    ask(other, ("What?", [picture(2)]), ("What?", [picture(7)]))
    assert other.seen == 1 and other.image_memory.load(tmp_path / "corpus") == 1
    other.image_memory.save(tmp_path / "corpus")
    again = counting(*seeing)
    assert again.image_memory.load(tmp_path / "corpus") == 2
    assert_idle(again)


def test_memory_without_layers(tmp_path):
    """Text that never sees an image: its K/V take nothing, and saving works all the same."""
    model, processor = seeing_model(t2v_layers=[])
    engine = counting(model, processor)
    ask(engine, ("What?", [picture()]))
    assert engine.image_memory.save(tmp_path / "corpus") == 1
    other = counting(*seeing_model(t2v_layers=[]))
    assert other.image_memory.load(tmp_path / "corpus") == 1
    ask(other, ("What?", [picture()]))
    assert other.seen == 0
    empty = counting(model, processor)
    assert empty.image_memory.save(tmp_path / "empty") == 0 and empty.image_memory.load(tmp_path / "empty") == 0


def test_a_memory_fits_the_same_checkpoint_from_a_folder(seeing, tmp_path):
    """The content decides: a memory outlives the process and the folder's name."""
    model, processor = seeing
    engine = counting(model, processor)
    ask(engine, ("What?", [picture()]))
    engine.image_memory.save(tmp_path / "corpus")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    other = counting(*vica.load(tmp_path / "model", device="cpu"))
    assert other.image_memory.load(tmp_path / "corpus") == 1
    ask(other, ("What?", [picture()]))
    assert other.seen == 0


def changed(what: str):
    """A model and processor that differ from `seeing_model()` in one thing."""
    if what in ("pad", "mean"):
        model, processor = seeing_model()
        if what == "pad":
            processor.image_mode = "crop"
        else:
            processor.image_processor.image_mean = [0.5, 0.5, 0.5]
        return model, processor
    if what in ("tower", "projector", "k_proj", "norm"):
        model, processor = seeing_model()
        name = dict(tower="layers.1.mlp.fc1.weight", projector="mm_projector.2.bias").get(what)
        name = name or dict(k_proj="layers.2.self_attn.k_proj.weight", norm="layers.0.input_layernorm.weight")[what]
        (weight,) = [
            p for n, p in model.named_parameters() if n.endswith("model." * (what in ("k_proj", "norm")) + name)
        ]
        with torch.no_grad():
            weight.view(-1)[3] += 1e-6
        return model, processor
    if what == "dtype":
        model, processor = seeing_model()
        return model.to(torch.bfloat16), processor
    return seeing_model(**{
        "layers": dict(t2v_layers=[0, 1]), "variant": dict(variant="dense"),
        "rotary": dict(text_config=dict(rope_parameters=dict(rope_type="default", rope_theta=5e4))),
    }[what])  # fmt: skip


@pytest.mark.parametrize(
    "what, named",
    [
        ("layers", r"layers \(\[0, 2\]\) than this model's \(\[0, 1\]\)"), ("variant", r"layers \(\[0, 2\]\)"),
        ("dtype", "weights|dtype"), ("rotary", "rotary"), ("pad", "preprocessing"), ("mean", "preprocessing"),
        ("tower", "weights"), ("projector", "weights"), ("k_proj", "weights"), ("norm", "weights"),
    ],
)  # fmt: skip
def test_another_models_memory_is_refused(what, named, tmp_path):
    engine = counting(*seeing_model())
    ask(engine, ("What?", [picture()]))
    engine.image_memory.save(tmp_path / "corpus")
    other = counting(*changed(what))
    with pytest.raises(ViCAError, match=f"corpus' was made with other {named}") as error:
        other.image_memory.load(tmp_path / "corpus")
    assert "\n" not in str(error.value) and not other.image_memory.entries


def test_weights_without_influence_on_kv_may_change(tmp_path):
    """Stored K/V do not depend on the weights after attention, on other layers, or on the head."""
    engine = counting(*seeing_model())
    ask(engine, ("What?", [picture()]))
    engine.image_memory.save(tmp_path / "corpus")
    model, processor = seeing_model()
    with torch.no_grad():
        for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
            model.get_parameter(name).mul_(1.1)
    other = counting(model, processor)
    assert other.image_memory.load(tmp_path / "corpus") == 1
    ask(other, ("What?", [picture()]))
    assert other.seen == 0


def damage(content: bytes, how: str) -> bytes | None:
    if how in ("half", "a byte"):
        return content[: len(content) // 2] if how == "half" else content[:-1]
    return {"empty": b"", "text": b"hello " * 40, "header": content[:8] + b"x" + content[9:], "long": content + b"x"}[
        how
    ]


@pytest.mark.parametrize("how", ["half", "a byte", "empty", "text", "header", "long"])
def test_damaged_files(seeing, how, tmp_path):
    engine = counting(*seeing)
    ask(engine, ("What?", [picture()]))
    before = held(engine.image_memory)
    engine.image_memory.save(tmp_path / "corpus")
    (tmp_path / "corpus").write_bytes(damage((tmp_path / "corpus").read_bytes(), how))
    refuse(engine, tmp_path / "corpus", "cannot be read")
    assert held(engine.image_memory).keys() == before.keys()


def refuse(engine, path, reason: str) -> None:
    with pytest.raises(ViCAError, match=reason) as error:
        engine.image_memory.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_files_of_other_kinds_are_refused(seeing, tmp_path):
    engine = counting(*seeing)
    refuse(engine, tmp_path / "missing", "no such file")
    refuse(engine, str(tmp_path), "cannot be read")
    save_file({"x@0": torch.zeros(3)}, tmp_path / "plain")
    refuse(engine, tmp_path / "plain", "not a file that image_memory.save wrote")
    for binding in (None, "{", json.dumps([])):
        metadata = {"format": "vica image memory 1"} | ({} if binding is None else {"binding": binding})
        save_file({"x@0": torch.zeros(3)}, tmp_path / "strange", metadata)
        refuse(engine, tmp_path / "strange", "not a file that image_memory.save wrote|was made with other")
    assert not engine.image_memory.entries


def test_a_save_that_fails_leaves_the_old_file(seeing, tmp_path, monkeypatch):
    engine = counting(*seeing)
    ask(engine, ("What?", [picture()]))
    engine.image_memory.save(tmp_path / "corpus")
    before = (tmp_path / "corpus").read_bytes()
    ask(engine, ("What?", [picture(1)]))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch.Tensor, "numpy", fail)
    with pytest.raises(OSError, match="disk full"):
        engine.image_memory.save(tmp_path / "corpus")
    assert (tmp_path / "corpus").read_bytes() == before


def test_another_layer_of_the_tower_is_another_memory(tmp_path):
    """The weights are the same, the features are not."""
    model, processor = seeing_model()
    engine = Engine(model, processor)
    engine.generate([Request.ask("What?", [picture(1)], max_new_tokens=1)])
    engine.image_memory.save(tmp_path / "memory")
    model.config.mm_vision_select_layer = -1
    with pytest.raises(ViCAError, match="other tower"):
        Engine(model, processor).image_memory.load(tmp_path / "memory")
