"""Tests training that is killed (kill -9) and restarted by the same command: it ends with the same weights bit for bit
and the same loss at every step as an undisturbed run."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.forks import STAGE_1, STAGE_2, argv, distance, losses, make_ground, start, weights

STEPS = 24
STREAM = {"stage": "finetune", "version": "v1", "streaming": True}
LORA = {**STAGE_2, "lora_enable": True, "lora_r": 4}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """Returns a starting point with data for 4.25 steps an epoch, of which two samples are broken."""
    root = make_ground(tmp_path_factory.mktemp("ground"))
    for name in ("pretrain", "finetune"):
        samples = json.loads((root / "world" / f"{name}.json").read_text())[:17]
        samples[5]["image"] = "train/missing.png"
        samples[13]["conversations"] = []
        (root / "world" / f"{name}.json").write_text(json.dumps(samples))
    (root / "world" / "finetune.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    return root


def command(ground: Path, output: Path, **settings) -> list[str]:
    if settings.get("streaming"):
        settings["data_path"] = ground / "world" / "finetune.jsonl"
    return argv(ground, output, max_steps=STEPS, save_steps=2, max_broken_share=0.2, **settings)


def run_undisturbed(ground: Path, name: str, **settings) -> Path:
    output = ground / "undisturbed" / name
    if not output.exists():
        output.parent.mkdir(exist_ok=True)
        start(command(ground, output, **settings), ground / f"{name}.log").finish()
    return output


def kill_in_step(run, steps: int, dice: Random) -> bool:
    """Kills within 50 ms after `steps` steps, anywhere in the run."""
    before = run.steps_logged()
    return run.kill_when(lambda: run.steps_logged() - before >= steps, after=0.05 * dice.random())


def save_begins(output: Path) -> Callable[[], bool]:
    """Returns whether this run has begun to save. It first clears the remains of the previous run."""
    cleared = False

    def begins() -> bool:
        nonlocal cleared
        there = (output / "unfinished").exists()
        cleared = cleared or not there
        return cleared and there

    return begins


def assert_alike(output: Path, undisturbed: Path) -> None:
    assert distance(weights(output), weights(undisturbed)) == 0
    assert losses(output) == losses(undisturbed)
    assert len(losses(output)) == STEPS
    assert sorted(os.listdir(output)) == sorted(os.listdir(undisturbed))
    lines = (output / "skipped.jsonl").read_text().splitlines()
    assert sorted(lines) == sorted((undisturbed / "skipped.jsonl").read_text().splitlines())
    assert len(lines) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kills, settings",
    [
        ("stage 2", 10, STAGE_2),
        ("stage 1", 2, STAGE_1),
        ("adapters", 2, LORA),
        ("workers", 2, {**STAGE_2, "dataloader_num_workers": 2}),
        ("stream", 2, {**STREAM, "dataloader_num_workers": 2}),
    ],
)
def test_killed_in_saves_and_in_steps(name, kills, settings, ground, tmp_path):
    undisturbed, output, log = run_undisturbed(ground, name, **settings), tmp_path / "out", tmp_path / "log"
    dice, killed, torn = Random(name), 0, 0
    for place in range(kills):
        run = start(command(ground, output, **settings), log)
        if place % 2:
            killed += kill_in_step(run, dice.randint(10 // kills, 20 // kills), dice)
        else:  # while it writes the next checkpoint: at once, or later
            killed += run.kill_when(save_begins(output), after=(place > 0) * 0.04 * dice.random())
        torn += (output / "unfinished").exists()
    start(command(ground, output, **settings), log).finish()
    assert_alike(output, undisturbed)
    assert killed == kills and torn


def test_a_finished_run_takes_no_step_when_restarted(ground, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    for _ in range(2):
        start(command(ground, output, **STAGE_2), log).finish()
    assert_alike(output, run_undisturbed(ground, "stage 2", **STAGE_2))


def die_while_deleting_a_checkpoint() -> None:
    """Makes the run die (kill -9) after it has deleted one file of the checkpoint."""
    rmtree = shutil.rmtree

    def deadly(folder, **options):
        if Path(folder).name.endswith(f"checkpoint-{STEPS - 2}"):
            next(Path(folder).iterdir()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        rmtree(folder, **options)

    shutil.rmtree = deadly


def test_killed_while_an_old_checkpoint_is_deleted(ground, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    (process,) = start(command(ground, output, **STAGE_2), log, sabotage=die_while_deleting_a_checkpoint).ranks
    process.join()
    assert process.exitcode == -signal.SIGKILL
    start(command(ground, output, **STAGE_2), log).finish()
    assert_alike(output, run_undisturbed(ground, "stage 2", **STAGE_2))
