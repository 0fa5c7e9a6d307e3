"""Tests the sources of benchmarks: the hub under its old and its newer name, stored images, and files that are no
JSON."""

import pytest

from tests.hub import local_hub, png
from vica.eval.data import hub_rows, read_json, read_lines, stored_image
from vica.utils.errors import ViCAError

ROWS = [{"question": "What?", "image": png("red")}, {"question": "Who?", "image": png("blue")}]


@pytest.mark.parametrize("owner", ("lmms-lab", "lmms-lab-encoder"))
def test_both_names_of_the_hubs_datasets(owner, monkeypatch, tmp_path):
    local_hub(monkeypatch, tmp_path, {(f"{owner}/POPE", None, "test"): ROWS})
    rows = hub_rows("lmms-lab/POPE", "test")
    assert [row["question"] for row in rows] == ["What?", "Who?"]
    images = [stored_image(rows, place, "key") for place in (1, 0)]
    assert [image.read() for image in images] == [png("blue"), png("red")] and images[0] == images[1]


def test_an_unavailable_dataset_is_a_one_line_error(monkeypatch, tmp_path):
    local_hub(monkeypatch, tmp_path, {})
    with pytest.raises(ViCAError, match="the hub's lmms-lab/GQA cannot be read: .*; nor under its newer name: "):
        hub_rows("lmms-lab/GQA", "testdev", "images")


def test_files_that_are_no_json_are_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n\nnot this\n')
    with pytest.raises(ViCAError, match="lines.jsonl, line 3 is no JSON"):
        list(read_lines(path, "get it"))
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')  # no UTF-8 either
    with pytest.raises(ViCAError, match="lines.jsonl, line 2 is no JSON"):
        list(read_lines(path, "get it"))
    with pytest.raises(ViCAError, match="lines.jsonl is no JSON"):
        read_json(path, "get it")
    with pytest.raises(ViCAError, match="none.json is not there. get it"):
        read_json(tmp_path / "none.json", "get it")
