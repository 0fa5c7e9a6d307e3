"""Tests the trained toy checkpoints of the repository on the nine benchmarks: mask and accel agree in every answer, and
every score follows from the world's own list of right answers."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from tests.eval.test_toy import COUNTS, data, truth_of  # noqa: F401 (a fixture)
from vica.cli.main import main
from vica.eval.tasks import TASKS
from vica.plan.config import ViCAConfig

CHECKPOINTS = Path(__file__).parents[2] / "playground/checkpoints"
RUNS = {"accel": "toy-vica", "mask": "toy-vica", "dense": "toy-dense"}


@pytest.fixture(scope="module")
def answered(data, tmp_path_factory):  # noqa: F811
    """Returns the output folder of `vica eval all` for each variant."""
    out = tmp_path_factory.mktemp("answered")
    for variant, checkpoint in RUNS.items():
        flags = ["--data", str(data), "--variant", variant, "--dtype", "float32", "--device", "cpu"]
        assert main(["eval", "all", "--model", str(CHECKPOINTS / checkpoint), "--out", str(out / variant), *flags]) == 0
    return out


def texts(folder: Path) -> dict:
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["question_id"]: row["text"] for row in rows}


def test_sizes_and_wiring():
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 15e6 and sum(path.stat().st_size for path in files) < 40e6
    vica, dense = (ViCAConfig.from_pretrained(CHECKPOINTS / name) for name in ("toy-vica", "toy-dense"))
    assert (vica.variant, dense.variant) == ("accel", "dense")
    assert 4 * len(vica.t2v_layers) == vica.text_config.num_hidden_layers == dense.text_config.num_hidden_layers


@pytest.mark.parametrize("name", TASKS)
def test_mask_and_accel_answer_alike(name, answered):
    mask, accel, dense = (texts(answered / variant / name) for variant in ("mask", "accel", "dense"))
    assert mask == accel and len(set(mask.values())) > 1
    assert dense.keys() == mask.keys()


def test_dense_is_another_model(answered):
    """Both models answer the few questions of most benchmarks without error, but somewhere they differ."""
    assert any(texts(answered / "dense" / name) != texts(answered / "mask" / name) for name in TASKS)


@pytest.mark.parametrize("variant", RUNS)
@pytest.mark.parametrize("name", TASKS)
def test_scores_are_the_worlds_own_count(name, variant, answered, data):  # noqa: F811
    entries = truth_of(data, name)
    said = [text.strip().lower() for text in texts(answered / variant / name).values()]
    rights = [text == entry["answer"].lower() for text, entry in zip(said, entries, strict=True)]
    if name in COUNTS:
        expected = COUNTS[name](entries, rights)
    else:
        worth = [
            1 if right else Fraction(str({k.lower(): v for k, v in entry.get("also", {}).items()}.get(text, 0)))
            for text, right, entry in zip(said, rights, entries)
        ]
        expected = 100 * sum(worth) / Fraction(len(worth))
    summary = json.loads((answered / variant / "summary.json").read_text())
    (row,) = (row for row in summary["benchmarks"] if row["task"] == name)
    assert row["score"] == pytest.approx(float(expected), abs=1e-6)
