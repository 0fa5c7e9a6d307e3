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
from vica.eval.tasks import TASKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return model_and_data(tmp_path_factory.mktemp("ground"), 8)


def run(name: str, ground: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    settings = dict(CKPT=str(ground / "model"), DATA=str(ground / "data"), PYTHON=sys.executable, OMP_NUM_THREADS="1")
    return subprocess.run(
        ["bash", f"scripts/v1_5/eval/{name}.sh", "--max-new-tokens", "3", *flags],
        cwd=ROOT, env={**os.environ, **settings, **environment}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_on_a_new_machine(name, ground, tmp_path):
    """Without any settings the script asks the shipped checkpoint about the toy world, which it draws if it is not
    there."""
    done = run(name, ground, "--out", str(tmp_path), CKPT="", DATA="")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]
    assert row["task"] == name and row["questions"] >= 24 and row["failed"] == 0
    assert row["title"] in done.stdout and f"{row['score']:.2f}" in done.stdout


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


@pytest.mark.slow
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
