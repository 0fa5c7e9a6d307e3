"""Wiring: the order in which settings are found, and how often a load looks at anything."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

import vica
from tests.builders import tiny_config, tiny_model, tiny_vision
from vica import testing
from vica.checkpoint import source as source_module
from vica.checkpoint.source import Source
from vica.plan import config as config_module
from vica.plan import wiring
from vica.plan.layer import LayerPlan
from vica.plan.vica import make_plan, parse_t2v_layers
from vica.plan.wiring import Wiring

SHORTV = [LayerPlan("update"), LayerPlan("read"), LayerPlan("update"), LayerPlan("read")]


@pytest.fixture
def recipe(tmp_path) -> Path:
    (tmp_path / "recipe.json").write_text(json.dumps(dict(t2v_layers=[2], freeze_prefix=2, variant="dense")))
    return tmp_path / "recipe.json"


@pytest.fixture
def custom():
    config = tiny_config()
    config.plan = SHORTV
    return config


# --- the order ---


def test_the_first_that_names_a_setting_decides_it(recipe, monkeypatch):
    held = tiny_config(t2v_layers=[0], freeze_prefix=True)
    assert Wiring().on(held).t2v_layers == [0], "the checkpoint"
    monkeypatch.setenv("T2V_LAYERS", "[1]")
    assert Wiring().on(held).t2v_layers == [1], "the environment"
    assert Wiring(recipe=recipe).on(held).t2v_layers == [2], "the recipe"
    assert Wiring(t2v_layers="[3]", recipe=recipe).on(held).t2v_layers == [3], "the call"
    assert Wiring(t2v_layers=[], recipe=recipe).on(held).t2v_layers == [], "no layer is a list of layers too"


def test_each_setting_has_an_order_of_its_own(recipe, monkeypatch):
    monkeypatch.setenv("T2V_LAYERS", "[1]")
    wired = Wiring(variant="mask", freeze_prefix=False, recipe=recipe).on(tiny_config())
    assert (wired.variant, wired.t2v_layers, wired.freeze_prefix) == ("mask", [2], False)
    assert Wiring(recipe=recipe).on(tiny_config()).freeze_prefix == 2
    assert Wiring(recipe=recipe).on(tiny_config()).variant == "accel", "a recipe describes weights, not a variant"


def test_an_empty_variable_names_nothing(monkeypatch):
    monkeypatch.setenv("T2V_LAYERS", "")
    assert Wiring().on(tiny_config()).t2v_layers == [0, 2]


def test_a_settled_config_follows_the_call_alone(monkeypatch):
    monkeypatch.setenv("T2V_LAYERS", "[1]")
    held = tiny_config()
    assert Wiring(variant="mask").only_on(held).t2v_layers == [0, 2]
    Wiring(freeze_prefix=1).change(held)
    assert (held.t2v_layers, held.freeze_prefix) == ([0, 2], 1)


def test_the_config_that_is_given_stays_as_it_was():
    held = tiny_config()
    Wiring("mask", [1], 2).on(held)
    assert (held.variant, held.t2v_layers, held.freeze_prefix) == ("accel", [0, 2], True)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (Wiring(variant="fast"), "variant is 'fast'; it must be one of"),
        (Wiring(t2v_layers=[9]), r"t2v_layers is \[9\]: 9 is no layer"),
        (Wiring(freeze_prefix=9), "freeze_prefix is 9; it must be"),
    ],
)
def test_an_error_names_the_setting_and_changes_nothing(wrong, message):
    held = tiny_config()
    with pytest.raises(vica.ViCAError, match=message):
        wrong.change(held)
    assert (held.variant, held.t2v_layers, held.freeze_prefix) == ("accel", [0, 2], True)


def test_an_error_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("T2V_LAYERS", "[0, 0]")
    with pytest.raises(vica.ViCAError, match="^T2V_LAYERS is"):
        Wiring().on(tiny_config())


def test_layers_that_nothing_names_are_asked_for():
    unnamed = tiny_config(t2v_layers=None)
    with pytest.raises(vica.ViCAError, match="needs t2v_layers"):
        Wiring().on(unnamed)
    assert Wiring(variant="dense").on(unnamed).plan == [LayerPlan()] * 4


# --- custom plans ---


def test_variants_follow_a_custom_plan(custom):
    assert Wiring(variant="mask").on(custom).plan == SHORTV
    assert Wiring().on(custom).plan == SHORTV
    custom.t2v_layers = None
    assert Wiring(variant="mask").on(custom).plan == SHORTV, "a custom plan needs no layers"


@pytest.mark.parametrize(
    "named, plan",
    [
        (dict(t2v_layers=[1]), make_plan("accel", 4, [1], True)),
        (dict(freeze_prefix=2), make_plan("accel", 4, [0, 2], 2)),
        (dict(variant="dense"), [LayerPlan()] * 4),
    ],
    ids=str,
)
def test_a_named_wiring_replaces_a_custom_plan(custom, named, plan):
    assert Wiring(**named).on(custom).plan == plan
    model = tiny_model()
    model.config.plan = SHORTV
    model.set_variant("mask")
    assert model.config.plan == SHORTV and model.config.variant == "mask"
    model.set_variant("accel")
    model.set_variant(**named)
    assert model.config.plan == plan and model.config.custom_plan is None


def test_a_named_wiring_replaces_a_custom_plan_through_transformers(tmp_path, custom):
    custom.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, variant="mask").plan == SHORTV
    assert AutoConfig.from_pretrained(tmp_path, t2v_layers=[1]).plan == make_plan("accel", 4, [1], True)


def test_layers_of_the_environment_replace_a_custom_plan(custom, monkeypatch):
    monkeypatch.setenv("T2V_LAYERS", "[1]")
    assert Wiring().on(custom).plan == make_plan("accel", 4, [1], True)


def test_a_change_that_fails_keeps_the_custom_plan(custom):
    with pytest.raises(vica.ViCAError):
        Wiring(t2v_layers=[9]).change(custom)
    assert custom.plan == SHORTV


@pytest.mark.parametrize("to", ["llava", "hf", "vica"])
def test_a_custom_plan_is_saved_in_every_format(tmp_path, to):
    model = tiny_model(vision_config=tiny_vision())
    model.config.plan = SHORTV
    model.save_pretrained(tmp_path / "m")
    vica.convert(tmp_path / "m", tmp_path / "out", to)
    assert vica.load(tmp_path / "out", device="cpu")[0].config.plan == SHORTV


# --- one look ---

# An audit hook cannot be removed, so there is one, which notes something only while this is a list.
opened: list[str] | None = None


def note_openings(event: str, arguments: tuple) -> None:
    if event == "open" and opened is not None and isinstance(arguments[0], (str, os.PathLike)):
        opened.append(os.path.basename(arguments[0]))


sys.addaudithook(note_openings)


@pytest.fixture
def looks(monkeypatch):
    """Counts what a load does: openings of files by name, folders that are looked up, lists that are parsed."""
    monkeypatch.setattr(sys.modules[__name__], "opened", [])
    found, parsed = [], []

    def find_folder(*args, **kwargs):
        found.append(args[0])
        return real(*args, **kwargs)

    def parse(value, *args, **kwargs):
        parsed.append(value)
        return parse_t2v_layers(value, *args, **kwargs)

    real = source_module.find_folder
    monkeypatch.setattr(source_module, "find_folder", find_folder)
    monkeypatch.setattr(config_module, "parse_t2v_layers", parse)
    settings = [s if s.name != "t2v_layers" else replace(s, parse=parse) for s in wiring.SETTINGS]
    monkeypatch.setattr(wiring, "SETTINGS", tuple(settings))
    return found, parsed


@pytest.mark.parametrize("by", ["argument", "environment", "checkpoint"])
def test_a_load_looks_once(tmp_path, looks, monkeypatch, by):
    found, parsed = looks
    testing.save(tmp_path)
    opened.clear(), parsed.clear()
    if by == "environment":
        monkeypatch.setenv("T2V_LAYERS", "[5]")
    model, processor = vica.load(tmp_path, device="cpu", **(dict(t2v_layers="[5]") if by == "argument" else {}))
    assert processor is not None and model.config.t2v_layers == ([0, 3] if by == "checkpoint" else [5])
    assert found == [tmp_path]
    for name in ("config.json", "generation_config.json"):
        assert opened.count(name) == 1, name
    assert parsed == [[0, 3]] + (["[5]"] if by != "checkpoint" else []), "each list once"


def test_a_source_is_what_the_folder_holds(tmp_path):
    testing.save(tmp_path / "whole")
    source = Source.at(tmp_path / "whole")
    assert (source.name, source.folder) == (str(tmp_path / "whole"), tmp_path / "whole")
    assert (source.format, source.kind, source.raw["t2v_layers"]) == ("vica", "whole", [0, 3])
    assert Source.at(source) is source


KINDS = {
    "language model": ({"model_type": "llama"}, ["model.safetensors"], "llava"),
    "adapters": ({"model_type": "llava_llama"}, ["adapter_config.json", "non_lora_trainables.bin"], "llava"),
    "projector": ({"model_type": "llava_llama"}, ["mm_projector.bin"], "llava"),
    "whole": ({"model_type": "llava", "text_config": {}}, ["model.safetensors.index.json", "mm_projector.bin"], "hf"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_checkpoints(tmp_path, kind):
    raw, held, format = KINDS[kind]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for name in held:
        (tmp_path / name).touch()
    source = Source.at(tmp_path)
    assert (source.kind, source.format) == (kind, format)
