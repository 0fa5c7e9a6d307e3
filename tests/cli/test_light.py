"""What must be there at once, and what is registered late: each in a process of its own, with nothing imported."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import vica
from vica.bench.models import SHAPES
from vica.bench.options import MEMORY_COLUMNS, PRESETS, THROUGHPUT_COLUMNS, VERBS
from vica.bench.throughput import ENGINES
from vica.cli.common import ANSWERS
from vica.engine import Request

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "playground/checkpoints/toy-vica"
HEAVY = ("torch", "transformers", "numpy", "matplotlib", "PIL")
AUTO = f"transformers.AutoConfig.from_pretrained({str(CHECKPOINT)!r})"


def run(*arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=ROOT)


def python(*lines: str) -> str:
    """Returns what a fresh interpreter prints."""
    done = run("-c", "\n".join(lines))
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--help"], 0, "usage: vica "),
        (["--version"], 0, f"vica {vica.__version__}\n"),
        (["--nope"], 2, "usage: vica "),
        (["ask", "--model", "m", "--nope", "Q"], 2, "unrecognized arguments: --nope"),
        (["ask", "--model", "./nowhere", "Q"], 1, "vica ask: ./nowhere is no folder with a checkpoint\n"),
        (["chat", "--model", "/nowhere"], 1, "vica chat: /nowhere is no folder with a checkpoint\n"),
        (["info", "a/b/c"], 1, "vica info: a/b/c is no folder here and cannot be had from the hub: Repo id must be"),
        (["ask", "--model", "nowhere", "Q"], 1, "vica ask: nowhere is no folder here and cannot be had from the hub:"),
        (["convert", "./nowhere", "x", "--to", "hf"], 1, "vica convert: ./nowhere is no folder with a checkpoint\n"),
        (["data", "check", "x", "--model", "./no"], 1, "vica data: ./no is no folder with a checkpoint\n"),
        (["bench", "flops", "--model", "./no"], 1, "vica bench: ./no is no folder with a checkpoint\n"),
        *(([verb, "--help"], 0, f"usage: vica {verb}") for verb in ("ask", "chat", "info", "convert", "train", "eval")),
        (["data", "check", "--help"], 0, "With --json stdout holds one JSON object"),
        *((["bench", what, "--help"], 0, f"usage: vica bench {what}") for what in VERBS),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_help_and_mistakes_import_nothing_heavy(arguments, code, said):
    done = run("-X", "importtime", "-m", "vica", *arguments)
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.split("|")[-1].strip().split(".")[0] for line in imports}
    mine = done.stdout + "".join(f"{x}\n" for x in done.stderr.splitlines() if x not in imports)
    assert done.returncode == code and said in mine
    assert "vica" in imported and not imported.intersection(HEAVY)


def test_a_wrong_picture_is_told_without_torch():
    done = run("-X", "importtime", "-m", "vica", "ask", "--model", str(CHECKPOINT), "--image", "nope.png", "Q")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "vica ask: image 'nope.png': no such file"
    assert "| torch" not in done.stderr and "transformers" not in done.stderr


@pytest.mark.parametrize(
    "order",
    ["import vica, transformers", "import transformers, vica", "from transformers import AutoConfig; import vica"],
)
def test_transformers_knows_vica_in_either_order(order):
    told = python(
        order,
        "import vica, transformers",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        f"config = {AUTO}",
        f"processor = AutoProcessor.from_pretrained({str(CHECKPOINT)!r})",
        "model = AutoModelForImageTextToText.from_config(config)",
        "print(*(type(x).__name__ for x in (config, model, processor)))",
    )
    assert told == "ViCAConfig ViCAForConditionalGeneration ViCAProcessor"


@pytest.mark.parametrize(
    "first",
    [
        "import vica.model.decoder",
        "vica.load",
    ],
)
def test_whatever_of_both_comes_first(first):
    told = python(
        "import vica, sys",
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules",
        first,
        "import transformers",
        "from transformers import AutoModelForImageTextToText as Auto, AutoProcessor",
        f"config = {AUTO}",
        "print(type(config).__name__, type(config) in Auto._model_mapping)",
        "print([type(x).__name__ for x in sys.meta_path if 'vica' in type(x).__module__])",
    )
    assert told == "ViCAConfig True\n[]"


def test_many_threads_import_at_once():
    told = python(
        "import threading, importlib, vica, transformers",
        "names = 'vica.engine', 'transformers', 'vica.plan.config', 'vica.model.llava', 'transformers.models.auto'",
        "threads = [threading.Thread(target=importlib.import_module, args=[name]) for name in names]",
        "[thread.start() for thread in threads]",
        "[thread.join() for thread in threads]",
        f"print({AUTO}.model_type)",
    )
    assert told == "vica"


def test_transformers_imports_where_ours_fails():
    """And tries again with the next import."""
    done = run(
        "-c",
        "import sys, vica\n"
        "sys.modules['vica.loading'] = sys.modules['vica.model.llava'] = None\n"
        "from transformers import AutoConfig\n"
        "import transformers\n"
        "print('imported')\n"
        "del sys.modules['vica.loading'], sys.modules['vica.model.llava']\n"
        "import vica.utils.table\n"
        f"print({AUTO}.model_type)\n",
    )
    assert done.returncode == 0 and done.stdout == "imported\nvica\n", done.stderr
    assert not done.stderr


def test_a_config_is_unpickled_in_a_fresh_process(tmp_path):
    config = vica.ViCAConfig.from_pretrained(CHECKPOINT)
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(config))
    told = python(
        "import pickle",
        f"config = pickle.load(open({str(tmp_path / 'config.pkl')!r}, 'rb'))",
        "import transformers",
        f"print(type(config).__name__, config.t2v_layers, type({AUTO}) is type(config))",
    )
    assert told == f"ViCAConfig {config.t2v_layers} True"


def test_public_names(tmp_path):
    told = python(
        "import vica",
        "assert set(vica.__all__) <= set(dir(vica))",
        "from vica import *",
        "print(*sorted(x for x in vica.__all__ if globals()[x] is getattr(vica, x)))",
        "print(vica.plan.vica.VARIANTS, vica.engine.Engine.__name__, issubclass(ViCAError, ValueError))",
        "print(hasattr(vica, 'nothing'), hasattr(vica, '_nothing'))",
    )
    assert told.splitlines()[0].split() == sorted(vica.__all__)
    assert told.splitlines()[1:] == ["('accel', 'mask', 'dense') Engine True", "False False"]


def test_what_is_written_out_equals_what_is_imported_late():
    for name, value in ANSWERS.items():
        assert getattr(Request([]), name) == value
    assert PRESETS == (*SHAPES, "toy")
    assert THROUGHPUT_COLUMNS[2:] == tuple(ENGINES) and set(MEMORY_COLUMNS.values()) == {"dense", "accel"}


def test_debug_tells_where_a_mistake_was_found():
    told = run("-m", "vica", "info", "./nowhere", "--log-level", "debug").stderr
    assert told.startswith("DEBUG vica.utils.program: raised here:\nTraceback")
    assert told.endswith("vica info: ./nowhere is no folder with a checkpoint\n")
