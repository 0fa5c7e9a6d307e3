"""Tests the README: its commands run, its code runs, its paths exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.toy import claim
from vica.cli.main import VERBS, build_parser
from vica.testing import save
from vica.toy import benchmarks

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
COMMANDS = [line.split("#")[0].strip() for kind, body in BLOCKS if kind == "bash" for line in body.splitlines()]
MAP = [body for kind, body in BLOCKS if not kind][-1]
VICA = [c for c in COMMANDS if re.match(r"(\w+=\S+ )?vica ", c)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    save(folder / "MODEL")
    benchmarks.write(folder / "playground" / "toy" / "eval", 8)
    return folder


def run(command: str, folder: Path, **kwargs) -> subprocess.CompletedProcess:
    """Runs a line of the README with this Python's `vica`, MODEL being the toy model."""
    command = re.sub(r"\b(MODEL|CONVERTED)\b", lambda m: shlex.quote(str(folder / m[0])), command)
    command = re.sub(r"playground/(toy/eval|answers)", lambda m: shlex.quote(str(folder / m[0])), command)
    command = re.sub(r"(^|\s)vica ", rf"\1{sys.executable} -m vica.cli.main ", command)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, shell=True, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, **kwargs)


@pytest.mark.parametrize("command", VICA)
def test_commands(command, folder):
    done = run(command, folder, input="Hello\n")
    if "vica-llava-1.5-7b" in command:  # the toy model has 8 layers, the published list names layer 14
        assert done.returncode == 1 and "is no layer of this model" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_all_verbs_are_shown():
    assert {c.split("vica ")[1].split()[0] for c in VICA} == set(VERBS)
    assert build_parser().prog == "vica"


@pytest.mark.slow
@pytest.mark.skipif(not any((ROOT / ".venv").glob("installed*")), reason="would install: run by scripts/test.sh")
def test_quickstart():
    assert COMMANDS[0] == "bash scripts/quickstart.sh" and COMMANDS[1] == "bash scripts/test.sh"
    done = subprocess.run(COMMANDS[0], shell=True, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Setting up" not in done.stderr, "installed once"
    lines = done.stdout.splitlines()
    assert sum("(right: " in line for line in lines) == 6
    assert any(line.split() == ["mask", "accel", "dense"] for line in lines)
    assert any(re.match(r"same answers as mask\s+-\s+6 of 6\s", line) for line in lines)
    apart = next(match for line in lines if (match := re.match(r"largest logit difference\s+-\s+(\S+)\s", line)))
    assert float(apart[1]) < 1e-3  # 0 if the kernels sum in the same order
    right = next(match for line in lines if (match := re.match(r"all\s+\d+\s+(\d+)\s+(\d+)$", line)))
    assert min(int(right[1]), int(right[2])) > 95, "trained, not guessing"


def test_python_examples(folder):
    """Runs them in one go: later ones use the objects of the first."""
    code = "\n".join(body for kind, body in BLOCKS if kind == "python")
    for name in ("MODEL", "pictures.safetensors"):
        code = code.replace(f'"{name}"', repr(str(folder / name)))
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=3", code)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (folder / "pictures.safetensors").stat().st_size > 0 and done.stdout.count("length") == 2


def test_figures_are_those_measured():
    """Compares the figures of the toy claim and of the benchmarks' hours, in the README and in docs/results, with the
    raw files."""
    results = ROOT / "docs/results"
    table = claim.markdown(json.loads((results / "toy/claim.json").read_text()))
    told = table.replace("training, s", "training of stage 2, s")
    assert told in (results / "toy.md").read_text()
    rows = {row[0]: row[1:] for row in (re.split(r" *\| *", line.strip("| ")) for line in table.splitlines())}
    of, flops = rows["of dense's accuracy"][1], rows["of dense's visual FLOPs"][1]
    dense, vica, _, blind = (cell.split()[0] for cell in rows["all"])
    text = " ".join(README.split())
    assert f"ViCA has {flops} of dense's visual compute and {of} of its accuracy" in text
    assert f"({dense}% of answers right for dense, {vica}% for ViCA, {blind}% blind;" in text
    cells = {cell["name"]: cell for cell in json.loads((results / "evaluation/eval.json").read_text())["cells"]}
    for name, form in (
        ("POPE", "POPE {:.0f} questions a second ({:.0f}x)"),
        ("VQAv2 (test-dev)", "VQAv2 {:.0f} ({:.0f}x)"),
    ):
        ours, theirs = (
            cells[name][n] / cells[name][s] for n, s in (("asked", "seconds"), ("peer_questions", "peer_seconds"))
        )
        assert form.format(ours, ours / theirs) in text


def test_paths_exist():
    """Checks everything that looks like a path of this repository, in text, tables and the map of the code."""
    plain = re.findall(r"(?:vica|configs|scripts|docs|tests|playground)/[\w./-]*\w/?", README)
    base = ""
    for line in MAP.splitlines():
        if match := re.match(r"(\S+/)\s", line):
            base = match[1]
        plain += [base + name for name in re.findall(r"\b\w+\.(?:py|sh)\b", line)]
    assert len(plain) > 30
    made = ("playground/toy/eval", "playground/answers", "playground/data")  # made by a user, or for one
    missing = [p for p in plain if not (ROOT / p).exists() and not p.startswith(made)]
    assert not missing


def test_the_map_names_every_file():
    files = [
        p
        for d in ("model", "data", "train", "engine", "bench", "toy")
        for p in (ROOT / "vica" / d).glob("*.py")
        if not p.name.startswith("__")
    ]
    assert not [p.name for p in files if p.name not in MAP]
