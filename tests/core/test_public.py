"""What users rely on stays: nothing of frozen.json and added.json goes or changes, and nothing new is missing there."""

import pytest

from tests import surface


@pytest.fixture(scope="module")
def now(tmp_path_factory) -> dict[str, str]:
    return surface.collect(tmp_path_factory.mktemp("surface"))


def test_the_public_surface_is_the_recorded_one(now):
    found = surface.differences(now)
    assert not found, "\n".join(["the public surface differs (see tests/surface.py):", *found])


def test_each_kind_of_difference_is_named():
    told = surface.recorded("frozen") | surface.recorded("added")
    changed = {**told, "vica.load(variant)": "keyword", "vica fly": "a verb"}
    del changed["vica ask --image"]
    assert surface.differences(changed) == [
        "gone: vica ask --image (append, default [])",
        "changed: vica.load(variant): place 1, default None, now keyword",
        "new: vica fly (a verb)",
    ]


def test_what_was_added_is_not_what_was_frozen():
    assert not surface.recorded("frozen").keys() & surface.recorded("added").keys()
