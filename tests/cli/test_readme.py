"""No word in the README and in docs/ that does not hold: commands and code run, paths exist, figures were measured."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.toy import claim, picture
from vica.cli.main import VERBS, build_parser
from vica.plan.config import ViCAConfig
from vica.testing import save
from vica.toy import benchmarks

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
# The README first: python in docs/ goes on with what its example has loaded.
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
PAGES |= {path: path.read_text(encoding="utf-8") for path in map(ROOT.joinpath, OTHERS)}
README = PAGES[ROOT / "README.md"]
BLOCKS = [block for text in PAGES.values() for block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)]
COMMANDS = [line.split("#")[0].strip() for kind, body in BLOCKS if kind == "bash" for line in body.splitlines()]
VICA = sorted({c for c in COMMANDS if re.match(r"(\w+=\S+ )?vica ", c)})


def words_of(page: str) -> str:
    return " ".join(PAGES[ROOT / page].split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    save(folder / "MODEL")
    benchmarks.write(folder / "playground" / "toy" / "eval", 8)
    return folder


def run(command: str, folder: Path, **kwargs) -> subprocess.CompletedProcess:
    """A line of the README with this Python's `vica`, MODEL being the toy model."""
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
    assert float(apart[1]) < 1e-3  # 0 where the kernels add up alike
    right = next(match for line in lines if (match := re.match(r"all\s+\d+\s+(\d+)\s+(\d+)$", line)))
    assert min(int(right[1]), int(right[2])) > 95, "trained, not guessing"


def test_python_examples(folder):
    """In one go: the later ones go on with what the first has loaded."""
    code = "\n".join(body for kind, body in BLOCKS if kind == "python")
    for name in ("MODEL", "pictures.safetensors"):
        code = code.replace(f'"{name}"', repr(str(folder / name)))
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=3", code)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (folder / "pictures.safetensors").stat().st_size > 0
    assert done.stdout.count("length") == 2 * code.count("result.finish_reason") == 4


def test_the_readme_is_one_page():
    example = next(body for kind, body in BLOCKS if kind == "python")
    assert len(README.splitlines()) <= 110 and len(example.splitlines()) == 12


def test_toy_figures_are_those_measured():
    """The toy claim, in the README and in docs/results, from the raw file."""
    table = claim.markdown(json.loads((RESULTS / "toy/claim.json").read_text()))
    assert table.replace("training, s", "training of stage 2, s") in (RESULTS / "toy.md").read_text()
    rows = {row[0]: row[1:] for row in (re.split(r" *\| *", line.strip("| ")) for line in table.splitlines())}
    of, flops = rows["of dense's accuracy"][1], rows["of dense's visual FLOPs"][1]
    dense, vica, _, blind = (cell.split()[0] for cell in rows["all"])
    text = words_of("README.md")
    assert f"ViCA has {flops} of dense's visual compute and {of} of its accuracy" in text
    assert f"({dense}% of answers right for dense, {vica}% for ViCA, {blind}% blind;" in text


def test_the_picture_is_of_the_models_that_are_here():
    """Compares it with what its script counts for these questions; milliseconds are those of one machine."""
    told = json.loads((RESULTS / "toy/picture.json").read_text())
    for name, checkpoint in picture.MODELS:
        counted = picture.counted(ViCAConfig.from_pretrained(ROOT / "playground/checkpoints" / checkpoint))
        bill = told["bills"][name]
        assert counted.items() <= bill.items() and bill["answer"] == told["question"]["answer"]
    asked = [json.loads(line) for line in (picture.PICTURES / "questions.jsonl").read_text().splitlines()]
    assert told["question"]["text"] in {one["text"].splitlines()[0] for one in asked}
    assert told["bills"]["ViCA"]["prefill_ms"] < told["bills"]["dense"]["prefill_ms"]


def test_evaluation_figures_are_those_measured():
    cells = {cell["name"]: cell for cell in json.loads((RESULTS / "evaluation/eval.json").read_text())["cells"]}
    for name, form in (
        ("POPE", "POPE {:.0f} questions a second ({:.0f}x)"),
        ("VQAv2 (test-dev)", "VQAv2 {:.0f} ({:.0f}x)"),
    ):
        ours, theirs = (
            cells[name][n] / cells[name][s] for n, s in (("asked", "seconds"), ("peer_questions", "peer_seconds"))
        )
        assert form.format(ours, ours / theirs) in words_of("docs/evaluation.md")


# The table of docs/engine.md: a row's name, and the measurement's column.
PREFILL = (
    ("transformers, dense", "transformers"),
    ("our engine, dense", "dense"),
    ("our engine, accel", "prefix"),
    ("the same, images kept", "image"),
)


def test_speed_figures_are_those_measured():
    cells = json.loads((RESULTS / "speed/latency.json").read_text())["cells"]
    ms = {(cell["column"], cell["batch"]): cell["ms"] for cell in cells if cell["phase"] == "prefill"}
    page = (ROOT / "docs/engine.md").read_text()
    for name, column in PREFILL:
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        told = re.findall(r"\| ([\d.]+)(?: \(([\d.]+)x\))?(?= \|)", row)
        for batch, (time, times) in zip((1, 8, 32, 64), told, strict=True):
            assert abs(float(time) - ms[column, batch]) <= 0.5 * 10.0 ** -len(time.partition(".")[2]), (name, batch)
            assert not times or times == f"{ms['transformers', batch] / ms[column, batch]:.1f}", (name, batch)
    ours, theirs = ms["prefix", 32], ms["transformers", 32]
    assert f"prefill takes {ours:.1f} ms against {theirs:.0f} ms in transformers ({theirs / ours:.1f}x)" in words_of(
        "README.md"
    )
    cells = json.loads((RESULTS / "speed/throughput.json").read_text())["cells"]
    rates = {name: max(c["questions_per_s"] for c in cells if c["column"] == name) for name in ("image", "batched")}
    alone = next(cell for cell in cells if cell["column"] == "transformers")["questions_per_s"]
    best = rates["image"]
    assert (
        f"{best:,.0f} questions a second, {best / alone:.0f} times transformers one by one and "
        f"{best / rates['batched']:.0f} times its best batch" in words_of("docs/engine.md")
    )


def test_training_figures_are_those_measured():
    cells = json.loads((RESULTS / "training/train.json").read_text())["cells"]
    rate = {(cell["column"], cell["stage"]): cell["samples_per_s"] for cell in cells}
    page = (ROOT / "docs/training.md").read_text()
    columns = ("transformers", "mask", "dense", "accel", "stored")
    rows = page.split("| samples/s | stage 1 | stage 2 |")[1].splitlines()[2 : 2 + len(columns)]
    gains = {stage: rate["accel", stage] / rate["dense", stage] for stage in ("pretrain", "finetune")}
    for column, row in zip(columns, rows, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
        for stage, cell in zip(gains, cells, strict=True):
            gain = f" ({gains[stage]:.1f}x dense)" if column == "accel" else ""
            assert cell == f"{rate[column, stage]:.1f}{gain}", row
    told = f"training {gains['pretrain']:.1f}x (stage 1) and {gains['finetune']:.1f}x (stage 2) as many samples/s"
    assert told in words_of("README.md")


MADE = ("playground/toy/eval", "playground/answers", "playground/data")  # by a user, or for one


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_exist(page):
    """Checks everything that looks like a path of this repository, and every link into it."""
    text = PAGES[page]
    if page.name == "from-llava.md":  # the first column is LLaVA's
        text = re.sub(r"^\| .*? \| ", "| ", text, flags=re.M)
    paths = re.findall(r"(?<![\w./-])(?:vica|configs|scripts|docs|tests|playground|examples)/[\w./-]*\w/?", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not re.match("https?:", link)]
    missing = [p for p in paths if not (ROOT / p).exists() and not p.startswith(MADE)]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing and (paths or links)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "bash scripts/" in c])
def test_scripts_exist(command):
    assert (ROOT / re.search(r"scripts/[\w./]+", command)[0]).is_file()
