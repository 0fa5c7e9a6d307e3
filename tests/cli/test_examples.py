"""examples/ runs as it stands: scripts print right answers, and the notebook's outputs are those of its cells."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PICTURES = ROOT / "playground/toy/pictures"
NOTEBOOK = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
RIGHT = {
    line["question_id"]: line["answer"]
    for line in map(json.loads, open(PICTURES / "questions.jsonl", encoding="utf-8"))
}


def run(name: str, *args, cwd: Path = ROOT) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, EXAMPLES / name, *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ask(tmp_path):
    lines = run("ask.py", cwd=tmp_path).splitlines()
    assert lines[:2] == ["accel: 2", "mask: 2"]
    assert float(lines[2].rpartition(" ")[2]) < 1e-3


def test_batch():
    lines = [json.loads(line) for line in run("batch.py").splitlines()]
    assert {line["question_id"]: line["text"] for line in lines} == RIGHT


def test_batch_with_a_file_of_ones_own(tmp_path):
    """An image that is not there has its reason, and the other questions their answers."""
    asked = [
        dict(question_id="a", image="3.png", text="How many triangles are there?"),
        dict(question_id="b", image="none.png", text="Is there a star?"),
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    assert run("batch.py", tmp_path / "asked.jsonl", PICTURES, tmp_path / "answers.jsonl") == ""
    answers = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    answers = {line.pop("question_id"): line for line in answers}
    assert answers["a"] == {"text": "2"} and "none.png': no such file" in answers["b"]["error"]


@pytest.mark.slow
def test_train():
    lines = run("train.py").splitlines()
    losses = [float(line.split()[-1]) for line in lines if "loss" in line]
    assert losses[-1] < losses[0] / 10
    assert lines[0] != "before: Some shapes." and lines[-1] == "after: Some shapes."


def test_notebook(monkeypatch):
    """Its code in one namespace, from the folder that Jupyter opens it in; what it prints is what it shows."""
    monkeypatch.chdir(EXAMPLES)
    space: dict = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
        shown = ["".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream"]
        assert printed.getvalue() == "".join(shown), cell["id"]


def test_notebook_is_one():
    """Holds what Jupyter requires of nbformat 4.5, and small outputs only."""
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["nbformat_minor"] == 5
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) > 5
    assert (EXAMPLES / "quickstart.ipynb").stat().st_size < 20_000


def test_all_examples_are_listed():
    listed = (EXAMPLES / "README.md").read_text()
    assert all(
        f"[{path.name}]({path.name})" in listed for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")
    )
