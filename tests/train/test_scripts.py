"""Tests scripts/v1_5: every flag is known, every script parses, and one of them trains."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.training import LAYERS, arguments, losses, write_base
from vica.toy.write import write
from vica.train.arguments import build_parser, parse
from vica.train.flags import GROUPS
from vica.train.help import help_parser
from vica.train.run import main

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(p for p in (ROOT / "scripts").rglob("*") if p.suffix in (".sh", ".slurm"))
TRAINING = [p for p in SCRIPTS if p.parent.name == "v1_5"]
LAUNCHERS = {
    "--num_gpus", "--master_port", "--hostfile", "--module", "--nproc_per_node", "--nnodes", "--node_rank",
    "--master_addr", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--job-name",
}  # fmt: skip


def flags_of(script: Path) -> set[str]:
    lines = [line for line in script.read_text().splitlines() if not line.startswith("# ")]
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(lines)))


@pytest.mark.parametrize("script", TRAINING, ids=lambda p: p.name)
def test_flags_are_known(script):
    known = set(build_parser()._option_string_actions)
    assert not flags_of(script) - known - LAUNCHERS
    assert script.name in ("launch.sh", "finetune.slurm") or len(flags_of(script)) > 8


def test_help_has_every_flag_in_groups_ours_first():
    told = help_parser().format_help()
    assert build_parser().format_help() == told
    shown = re.findall(r"^  --(\w+)", told, re.M)
    assert sorted(shown) == sorted({action.dest for action in build_parser()._actions} - {"help"})
    ours = [name for names in GROUPS.values() for name in names]
    assert shown[: len(ours)] == ours
    words = " ".join(told.split())
    assert words.index("what learns:") < words.index("LLaVA's flags") < words.index("transformers' own")
    for default in ("--lora_r N rank of the adapters (default: 64)", "training. (default: 8)", "cut (default: 2048)"):
        assert default in words


FLAGS = dict(
    model_name_or_path="llm", data_path=["a.json", "b.json"], output_dir="out", stage="pretrain", learning_rate="2e-5",
    t2v_layers=[0, 2], freeze_prefix=False, bf16=False, mm_vision_select_layer=-3, image_folder=None, use_cpu=True,
)  # fmt: skip


def test_a_file_of_settings_stands_for_flags(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(FLAGS))
    (tmp_path / "a.yaml").write_text(
        "model_name_or_path: llm\ndata_path: [a.json, b.json]\noutput_dir: out\nstage: pretrain\n"
        "learning_rate: 2e-5\nt2v_layers: [0, 2]\nfreeze-prefix: false\nbf16: no\nmm_vision_select_layer: -3\n"
        "image_folder:\nuse_cpu: yes\n"
    )
    flags = (
        "--model_name_or_path llm --data_path a.json b.json --output_dir out --stage pretrain --learning_rate 2e-5 "
        "--freeze_prefix false --bf16 False --mm_vision_select_layer -3 --use_cpu True --t2v_layers"
    )
    parsed = [
        parse(words) for words in ([*flags.split(), "[0, 2]"], [str(tmp_path / "a.json")], [str(tmp_path / "a.yaml")])
    ]
    wanted, *got = [(vars(model), vars(data), train.to_dict()) for model, data, train in parsed]
    assert got == [wanted, wanted]
    model, data, train = parse([str(tmp_path / "a.yaml"), "--learning_rate", "1e-3", "--data_path", "c.json"])
    assert (model.t2v_layers, data.data_path, train.learning_rate) == ("[0, 2]", ["c.json"], 1e-3)
    assert parse(["--local_rank=-1", str(tmp_path / "a.yaml")])[0].model_name_or_path == "llm", (
        "after a launcher's flag"
    )


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.yaml", "learning_rat: 1", "'learning_rat' is no flag of vica train; is learning_rate meant?"),
        ("a.yaml", "zzz: 1", "'zzz' is no flag of vica train"),
        ("a.yaml", "learning_rate: fast", "invalid float value: 'fast'"),
        ("a.yaml", "per_device_train_batch_size: 2.5", "invalid int value: '2.5'"),
        ("a.json", '{"bits": 5}', "invalid choice: 5"),
        ("a.json", '{"use_cpu": "maybe"}', "Truthy value expected"),
        ("a.yaml", "save_total_limit:", "save_total_limit is null, which no flag can say; its default is 1"),
        ("a.json", '{"use_cpu": ', "cannot be read"),
        ("a.yaml", "a: [1", "cannot be read"),
        ("a.yaml", "- 1", "holds a list, not a table of settings"),
        ("a.txt", "", "must end in .yaml, .yml, .json"),
        ("a.yaml", None, "no such file"),
    ],
)
def test_mistakes_in_a_file_of_settings_are_one_line(tmp_path, capsys, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main([str(tmp_path / name)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"vica train: {tmp_path / name}") and said in error and error.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def start(script: str, *flags: str, **variables) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    env |= {name: str(value) for name, value in variables.items()}
    command = ["bash", f"scripts/v1_5/{script}", *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


def test_pretrain_runs(tmp_path):
    """The file of configs/ decides all settings that no flag names."""
    base, world, out = write_base(tmp_path), write(tmp_path / "world", 20, 1), tmp_path / "out"
    flags = {"model_name_or_path": base / "llm", "vision_tower": base / "tower", "max_steps": 2}
    done = start(
        "pretrain.sh", *(str(x) for name, value in flags.items() for x in (f"--{name}", value)),
        DATA=world / "pretrain.json", IMAGES=world / "images", OUTPUT=out, T2V_LAYERS=LAYERS, BATCH=2, GLOBAL_BATCH=4,
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "batch 4 (1 processes), 20 samples" in done.stdout
    assert len(losses(out)) == 2 and (out / "mm_projector.bin").is_file()
    assert json.loads((out / "config.json").read_text())["image_aspect_ratio"] == "square"  # as LLaVA's stage 1


def test_a_task_is_learned_with_the_models_own_layers(tmp_path):
    """The layers are not those of the published model that MODEL names by default."""
    world, model = write(write_base(tmp_path) / "world", 20, 1), tmp_path / "model"
    assert main(arguments(tmp_path, model, t2v_layers="[1, 3]", freeze_prefix="2")) == 0
    done = start(
        "finetune_task.sh", "--max_steps", "1", CKPT=model, DATA=world / "finetune.json", IMAGES=world / "images",
        OUTPUT=tmp_path / "task", BATCH=2, GLOBAL_BATCH=2, CUDA_VISIBLE_DEVICES="", T2V_LAYERS="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wired = json.loads((tmp_path / "task/config.json").read_text())
    assert wired["t2v_layers"] == [1, 3] and wired["freeze_prefix"] == 2


def with_cards(folder: Path, cards: int) -> Path:
    """Returns an interpreter that reports `cards` cards, with a launcher beside it: both print how they were called."""
    shown = 'printf "%s " "$@"'
    python = f'if [ "$1" = -c ]; then case "$2" in *cuda*) echo {cards};; *) echo 4711;; esac; else {shown}; fi'
    for name, body in {"python": python, "deepspeed": shown}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder / "python"


@pytest.mark.parametrize(
    "cards, variables, said",
    [
        # DeepSpeed reads its rank from a launcher's variables
        (1, dict(), "-m torch.distributed.run --nproc_per_node 1 "),
        (1, dict(ENGINE="none"), "-m vica.train --per_device_train_batch_size 32 --gradient_accumulation_steps 8 "),
        (4, dict(), "-m vica.train --per_device_train_batch_size 32 --gradient_accumulation_steps 2 "),
    ],
)
def test_how_processes_are_started(tmp_path, cards, variables, said):
    done = start("pretrain.sh", PYTHON=with_cards(tmp_path, cards), **variables)
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


def test_machines_of_a_hostfile_share_the_batch(tmp_path):
    """GLOBAL_BATCH counts all slots, whatever this machine has."""
    (tmp_path / "hosts").write_text("# two machines\none slots=4\n  two\tslots=12 # the large one\n#three slots=4\n")
    variables = dict(PYTHON=with_cards(tmp_path, 4), HOSTFILE=tmp_path / "hosts", GLOBAL_BATCH=256, BATCH=8)
    done = start("pretrain.sh", **variables)
    assert done.returncode == 0 and f"--hostfile {tmp_path / 'hosts'} --master_port 29500 " in done.stdout
    assert "--per_device_train_batch_size 8 --gradient_accumulation_steps 2 " in done.stdout
    (tmp_path / "hosts").write_text("one\n")
    done = start("pretrain.sh", **variables)
    assert done.returncode == 1 and "no line of it reads like 'machine slots=8'" in done.stderr


def test_deepspeed_without_a_launcher(tmp_path):
    pytest.importorskip("deepspeed")
    done = start("pretrain.sh", "--deepspeed", "configs/zero2.json", OUTPUT=tmp_path, GPUS=1, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "vica train: --deepspeed wants a launcher, be it for one process: torchrun" in done.stderr


@pytest.mark.parametrize("python, reason", [("bin/python", "No module named 'torch'"), ("none", "No such file")])
def test_python_without_torch(tmp_path, python, reason):
    venv.create(tmp_path, symlinks=True)
    done = start("pretrain.sh", PYTHON=tmp_path / python)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{tmp_path / python} has no torch") and reason in done.stderr
    assert "pip install -e '.[train]'" in done.stderr


@pytest.mark.parametrize(
    "script, variables, said",
    [
        ("pretrain.sh", dict(MODEL="9b"), "MODEL is '9b': there is no configs/vica-llava-1.5-9b.json"),
        ("pretrain.sh", dict(GLOBAL_BATCH=5, BATCH=2, GPUS=1), "GLOBAL_BATCH=5 is no multiple of BATCH=2"),
        ("pretrain.sh", dict(GPUS="x"), "GPUS is 'x'; it must be a whole number from 1"),
        ("finetune.sh", dict(BATCH=0), "BATCH is '0'; it must be a whole number from 1"),
        ("finetune_task.sh", dict(), "DATA: names the samples"),
    ],
)
def test_mistakes_in_the_environment(script, variables, said):
    done = start(script, **variables)
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
