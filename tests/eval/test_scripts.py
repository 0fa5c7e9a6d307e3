"""Tests scripts/v1_5/eval as its users run it, with one process and with several."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation import model_and_data
from vica.cli.main import main
from vica.eval.tasks import TASKS

ROOT = Path(__file__).parents[2]
SHIPPED, DRAWN = "playground/checkpoints/toy-vica", "playground/toy/eval"


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return model_and_data(tmp_path_factory.mktemp("ground"), 8)


def run(name: str, ground: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    settings = dict(CKPT=str(ground / "model"), DATA=str(ground / "data"), PYTHON=sys.executable, OMP_NUM_THREADS="1")
    return subprocess.run(
        ["bash", f"scripts/v1_5/eval/{name}.sh", "--max-new-tokens", "3", *flags],
        cwd=ROOT, env={**os.environ, **settings, **environment}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_each_script_asks_its_benchmark(name, ground, tmp_path):
    """Without any settings the script asks the shipped checkpoint about the toy world."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nif [ "$1" = -c ]; then echo 0; else echo "$@"; fi\n')
    python.chmod(0o755)
    done = run(name, ground, "--limit", "2", CKPT="", DATA="", PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    asked = f"-m vica.cli.main eval {name} --model {SHIPPED} --data {DRAWN} --max-new-tokens 3 --limit 2"
    assert done.stdout.splitlines()[-1] == asked


def check_summary(folder: Path, names: list[str], shown: str) -> None:
    rows = json.loads((folder / "summary.json").read_text())["benchmarks"]
    assert [row["task"] for row in rows] == names
    for row in rows:
        assert row["questions"] >= 24 and row["failed"] == 0
        assert row["title"] in shown and f"{row['score']:.2f}" in shown


@pytest.mark.slow
def test_on_a_new_machine(ground, tmp_path, capsys):
    """Without any settings the script draws the toy world if it is not there. Only the first benchmark runs as a
    script: a start takes longer than the questions."""
    first, *others = TASKS
    done = run(first, ground, "--out", str(tmp_path / "first"), CKPT="", DATA="")
    assert done.returncode == 0, done.stderr
    check_summary(tmp_path / "first", [first], done.stdout)
    where = ["--model", str(ROOT / SHIPPED), "--data", str(ROOT / DRAWN), "--out", str(tmp_path / "others")]
    assert main(["eval", *others, *where, "--max-new-tokens", "3"]) == 0
    check_summary(tmp_path / "others", others, capsys.readouterr().out)


@pytest.mark.slow
def test_two_processes(ground, tmp_path):
    """Runs beside another run that uses torchrun's usual port."""
    with contextlib.ExitStack() as taken:
        with contextlib.suppress(OSError):  # the port is taken
            taken.enter_context(socket.create_server(("", 29500)))
        done = run("mmbench_cn", ground, "--out", str(tmp_path / "two"), GPUS="2")
    assert done.returncode == 0, done.stderr
    assert "circular accuracy" in done.stdout and done.stdout.count("MMBench_CN:") == 1
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert [row["task"] for row in summary["benchmarks"]] == ["mmbench_cn"]
    assert (tmp_path / "two" / "mmbench_cn" / "mmbench_cn.xlsx").exists()


def test_layers_from_the_environment(ground, tmp_path):
    done = run("sqa", ground, "--out", str(tmp_path), "--variant", "mask", "--limit", "2", T2V_LAYERS="[1,2]")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["t2v_layers"] == [1, 2] and summary["variant"] == "mask"
    assert summary["benchmarks"][0]["questions"] == 2


def test_a_mistake_is_a_one_line_error(ground, tmp_path):
    done = run("gqa", ground, "--out", str(tmp_path), DATA=str(tmp_path / "none"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "none/gqa" in done.stderr.strip().splitlines()[-1] and "is not there" in done.stderr
