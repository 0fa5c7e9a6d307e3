"""The rule of visibility, the plan and the token layout, against tables a reader can check by eye."""

import json
from pathlib import Path

import numpy as np
import pytest

import vica
from tests.builders import IMAGE, tiny_config
from vica.model.flow_mask import visible
from vica.model.generation import repeat_by_row
from vica.model.layout import expand, pad_index
from vica.plan.layer import LayerPlan
from vica.plan.vica import PUBLISHED, make_plan

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("vica-*.json"))


def table(rows: str) -> list[list[bool]]:
    return [[c == "x" for c in row.split()] for row in rows.strip().splitlines()]


# keys:        s  v  v  t  v  t        (s: prefix, v: visual, t: text)
SEEN = """
               x  .  .  .  .  .
               x  x  .  .  .  .
               x  x  x  .  .  .
               x  x  x  x  .  .
               x  x  x  x  x  .
               x  x  x  x  x  x
"""
UNSEEN = """
               x  .  .  .  .  .
               x  .  .  .  .  .
               x  .  .  .  .  .
               x  .  .  x  .  .
               x  .  .  x  .  .
               x  .  .  x  .  x
"""


@pytest.mark.parametrize("sees, want", [(True, SEEN), (False, UNSEEN)])
def test_visibility(sees, want):
    pos = np.arange(6)[None]
    visual = np.array([[0, 1, 1, 0, 1, 0]], bool)
    plan = LayerPlan("read" if sees else "skip")
    text = np.zeros((1, 6), bool)
    assert visible(pos, text, pos, visual, plan)[0].tolist() == table(want)


def test_padding_is_never_seen():
    pos = np.array([[-1, 0, 1]])
    none = np.zeros((1, 3), bool)
    assert visible(pos, none, pos, none, LayerPlan())[0, 2].tolist() == [False, True, True]


def test_expanded_row():
    ids = np.array([[0, 5, 6, IMAGE, 7, IMAGE, 8], [9, 9, 9, 9, 0, 0, 0]])
    valid = np.array([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]], bool)
    tokens = expand(ids, valid, [3, 1], IMAGE)
    first = tokens.row == 0
    assert tokens.pos[first].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert tokens.column[first].tolist() == [1, 2, 3, 3, 3, 4, 5, 6]
    assert tokens.visual[first].astype(int).tolist() == [0, 0, 1, 1, 1, 0, 1, 0]
    assert tokens.prefix[first].astype(int).tolist() == [1, 1, 0, 0, 0, 0, 0, 0], "the prefix ends at the first image"
    assert not tokens.prefix[~first].any(), "no image, no prefix"
    assert pad_index(tokens.row, 2).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, -1, -1, -1, -1]]


def test_later_turns_go_on_where_the_row_stands():
    ids, valid = np.array([[5, IMAGE, 6]]), np.ones((1, 3), bool)
    tokens = expand(ids, valid, [2], IMAGE, start=np.array([10]), seen_image=np.array([True]))
    assert tokens.pos.tolist() == [10, 11, 12, 13]
    assert not tokens.prefix.any(), "the row's prefix ended at its first image, long ago"


@pytest.mark.parametrize("rule, attends", [(True, "...."), (False, "xxxx"), (0, "...."), (1, "x..."), (4, "xxxx")])
def test_prefix_rules(rule, attends):
    plan = make_plan("accel", 4, [1], rule)
    assert "".join("x" if p.prefix_attends else "." for p in plan) == attends
    assert [p.reads for p in plan] == [False, True, False, False]


def test_dense_updates_everything():
    assert set(make_plan("dense", 3, None, True)) == {LayerPlan("update", text_reads=True, prefix_attends=True)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_what_the_error_message_tells(path):
    recipe = json.loads(path.read_text())
    assert (recipe["t2v_layers"], recipe["freeze_prefix"]) == PUBLISHED[recipe["name"]]


def test_every_published_model_has_a_config():
    assert len(CONFIGS) == len(PUBLISHED) == 3


def test_layers_are_sorted_and_kept_in_the_config(tmp_path):
    config = tiny_config(t2v_layers=(3, 1), freeze_prefix=2, variant="mask")
    config.save_pretrained(tmp_path)
    again = vica.ViCAConfig.from_pretrained(tmp_path)
    assert (again.t2v_layers, again.freeze_prefix, again.variant) == ([1, 3], 2, "mask")
    assert again.to_dict() == {**config.to_dict(), "transformers_version": again.to_dict()["transformers_version"]}


def test_copies_of_a_row_have_its_images_in_order():
    assert repeat_by_row(["a1", "a2", "b1"], [2, 0, 1], 2) == ["a1", "a2", "a1", "a2", "b1", "b1"]
    with pytest.raises(vica.ViCAError, match="hold 2 image placeholders, but 3 images"):
        repeat_by_row(["a1", "a2", "b1"], [2], 2)
