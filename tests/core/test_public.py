"""What users rely on stays: nothing that frozen.json or added.json lists goes or changes, and nothing new comes unlisted."""

import pytest

from tests import surface


@pytest.fixture(scope="module")
def now(tmp_path_factory) -> dict[str, str]:
    return surface.collect(tmp_path_factory.mktemp("surface"))


def test_nothing_public_goes_or_changes_unlisted(now):
    found = surface.differences(now)
    assert not found, "\n".join(["the public surface differs (see tests/surface.py):", *found])


def test_each_kind_of_difference_is_named(now):
    changed = {**now, "vica.load(variant)": "keyword", "vica serve": "a verb"}
    del changed["vica ask --image"]
    assert surface.differences(changed) == [
        "gone: vica ask --image (append, default [])",
        "changed: vica.load(variant): place 1, default None, now keyword",
        "new: vica serve (a verb)",
    ]


def test_what_was_added_is_not_what_was_frozen():
    assert not surface.recorded("frozen").keys() & surface.recorded("added").keys()
