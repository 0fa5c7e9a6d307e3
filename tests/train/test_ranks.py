"""Tests that two processes, under every engine, train as one process does on the batch of both: the same losses at
every step and the same saved weights within 1e-5, in float32."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState

from tests.forks import ON_CPU, STAGE_1, STAGE_2, argv, distance, free_port, losses, make_ground, start, weights
from vica.model.backbone_llama import Block

REPOSITORY = Path(__file__).parents[2]
TOLERANCE = 1e-5
STEPS = 10
# samples in file order: those with images and those without share a step
PLAIN = {"stage": "finetune", "version": "v1"}
ZERO3 = REPOSITORY / "configs/zero3.json"


def in_pieces(settings: Path) -> str:
    """Returns settings that shard every weight, as in a model of real size: ZeRO-3 would keep small ones whole on every
    rank."""
    changed = json.loads(settings.read_text())
    changed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return json.dumps(changed)


ENGINES = {
    "ddp": {},
    "zero2": {"deepspeed": REPOSITORY / "configs/zero2.json"},
    "zero3": {"deepspeed": in_pieces(ZERO3)},
    "fsdp": {"fsdp": "full_shard"},
}
# The gradient of a key's bias is only rounding error, which Adam with its usual epsilon would follow.
TOWER = {"unfreeze_mm_vision_tower": True, "adam_epsilon": 1e-4}


def shard_on_cpu() -> None:
    """Makes accelerate use FSDP on a CPU, where torch's own FSDP works: accelerate would silently fall back to DDP."""
    inner = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        inner(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    root = make_ground(tmp_path_factory.mktemp("ground"))
    samples = json.loads((root / "world" / "finetune.json").read_text())
    texts = [sample for sample in samples if "image" not in sample][:12]
    broken = {"id": "broken", "image": "train/missing.png", "conversations": samples[0]["conversations"]}
    mixed = [*samples[:8], *texts, broken]
    (root / "mixed.json").write_text(json.dumps(mixed))
    return root


def command(ground: Path, output: Path, batch: int, **settings) -> list[str]:
    settings = {"max_steps": STEPS, "save_steps": 100, "max_broken_share": 0.1} | settings
    return argv(ground, output, per_device_train_batch_size=batch, **settings)


def run_alone(ground: Path, name: str, **settings) -> Path:
    """Runs the referee, one process."""
    output = ground / "alone" / name
    if not output.exists():
        output.parent.mkdir(exist_ok=True)
        start(command(ground, output, **settings), ground / f"{name}.log").finish()
    return output


def run_both(ground: Path, output: Path, engine: str, **settings):
    hook = shard_on_cpu if engine == "fsdp" else None
    return start(command(ground, output, **ENGINES[engine], **settings), output.parent / "log", ranks=2, sabotage=hook)


def assert_alike(output: Path, alone: Path, steps: int = STEPS) -> None:
    assert len(losses(alone)) == steps
    assert distance(losses(output), losses(alone)) < TOLERANCE
    assert distance(weights(output), weights(alone)) < TOLERANCE


def run_launched(launcher: list[str], ground: Path, output: Path, **settings) -> None:
    """Runs by a launcher, with an exit code of its own: some of DeepSpeed's threads would abort a process at its
    end."""
    flags = command(ground, output, batch=4, **settings)
    environment = {**os.environ, **ON_CPU, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*launcher, *flags], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_stage_2_by_torchrun(engine, ground, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    run_launched([*torchrun, "-m", "vica.train"], ground, tmp_path / "out", **STAGE_2, **ENGINES[engine])
    assert_alike(tmp_path / "out", run_alone(ground, "stage 2", batch=8, **STAGE_2))


@pytest.mark.slow
def test_stage_2_by_the_script_and_the_deepspeed_launcher(ground, tmp_path, monkeypatch):
    wanted = {"LAUNCHER": "deepspeed", "PYTHON": sys.executable, "GPUS": 2, "BATCH": 4, "GLOBAL_BATCH": 8}
    for name, value in {**wanted, "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    script = ["bash", "scripts/v1_5/finetune.sh"]
    more = {"warmup_ratio": 0.03, "gradient_checkpointing": False}
    run_launched(script, ground, tmp_path / "out", **STAGE_2, deepspeed=ZERO3, **more)
    assert_alike(tmp_path / "out", run_alone(ground, "stage 2", batch=8, **STAGE_2))


@pytest.mark.slow
def test_stage_2_by_fsdp(ground, tmp_path):
    run_both(ground, tmp_path / "out", "fsdp", batch=4, **STAGE_2).finish()
    assert list((tmp_path / "out" / f"checkpoint-{STEPS}").glob("pytorch_model_fsdp*"))  # proves that FSDP ran
    assert_alike(tmp_path / "out", run_alone(ground, "stage 2", batch=8, **STAGE_2))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_stage_1(engine, ground, tmp_path):
    run_both(ground, tmp_path / "out", engine, batch=4, **STAGE_1).finish()
    assert_alike(tmp_path / "out", run_alone(ground, "stage 1", batch=8, **STAGE_1))


def refuse_a_reducer_that_is_left():
    destroy = torch.distributed.destroy_process_group

    def checked():
        left = [
            type(x).__name__ for x in gc.get_objects() if type(x).__name__ in ("Reducer", "DistributedDataParallel")
        ]
        assert not left, f"{left} would end the process group"
        destroy()

    torch.distributed.destroy_process_group = checked


@pytest.mark.slow
def test_no_reducer_outlives_the_process_group(ground, tmp_path):
    """A reducer that ends the group late may hang the process: once in a hundred runs."""
    flags = command(ground, tmp_path / "out", batch=4, **STAGE_1)
    start(flags, tmp_path / "log", ranks=2, sabotage=refuse_a_reducer_that_is_left).finish()


def count_gathering():
    """Fails a run in which ZeRO-3 gathers less than a block at once, or keeps a block beyond its backward pass."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    fetch, release, destroy = (
        Coordinator.fetch_sub_module, Coordinator.release_sub_module, torch.distributed.destroy_process_group
    )  # fmt: skip
    fetched, kept = Counter(), Counter()

    def counted_fetch(self, module, forward):
        fetched[type(module).__name__] += 1
        kept["Block"] += isinstance(module, Block) and not forward
        fetch(self, module, forward)

    def counted_release(self, module, forward=False):
        kept["Block"] -= isinstance(module, Block) and not forward
        release(self, module, forward)

    def checked():
        assert fetched["Block"] > 0 and fetched["CLIPEncoderLayer"] > 0 and not fetched.keys() & {"MLP", "CLIPMLP"}, (
            fetched
        )
        assert kept["Block"] == 0, f"{kept} backward passes did not release what they had gathered"
        destroy()

    Coordinator.fetch_sub_module, Coordinator.release_sub_module = counted_fetch, counted_release
    torch.distributed.destroy_process_group = checked


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["accel", "dense"])
@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])
def test_zero3_gathers_a_block_at_once(stage, variant, ground, tmp_path):
    settings = {**stage, **ENGINES["zero3"], "variant": variant, "gradient_checkpointing": True, "max_steps": 3}
    start(
        command(ground, tmp_path / "out", batch=4, **settings), tmp_path / "log", ranks=2, sabotage=count_gathering
    ).finish()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tower", [{}, TOWER], ids=["tower frozen", "tower learns"])
def test_text_on_one_rank_and_images_on_the_other(engine, tower, ground, tmp_path):
    settings = {**PLAIN, **tower, "data_path": ground / "mixed.json", "gradient_checkpointing": True}
    settings["seed"] = 1  # the ranks differ in the very first step, in which ZeRO-3 records the order of gathering
    run_both(ground, tmp_path / "out", engine, batch=1, **settings).finish()
    alone = run_alone(ground, f"mixed{len(tower)}", batch=2, **settings)
    assert_alike(tmp_path / "out", alone)
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == (alone / "skipped.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_accumulated_gradients(engine, ground, tmp_path):
    run_both(ground, tmp_path / "out", engine, batch=2, gradient_accumulation_steps=2, **STAGE_2).finish()
    assert_alike(tmp_path / "out", run_alone(ground, "stage 2", batch=8, **STAGE_2))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stage", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])
def test_killed_and_started_again(engine, stage, ground, tmp_path):
    output = tmp_path / "out"
    run = run_both(ground, output, engine, batch=4, save_steps=5, **stage)
    assert run.kill_when((output / "checkpoint-5").exists)
    run_both(ground, output, engine, batch=4, save_steps=5, **stage).finish()
    assert_alike(output, run_alone(ground, f"stage {1 if stage is STAGE_1 else 2}", batch=8, **stage))


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [True, False])
def test_killed_within_a_later_epoch(grouped, ground, tmp_path):
    """Trains three epochs of four steps; the last step of an epoch is smaller than the others."""
    samples = json.loads((ground / "world" / "finetune.json").read_text())
    (tmp_path / "few.json").write_text(json.dumps(samples[:37]))
    settings = {**PLAIN, "group_by_modality_length": grouped, "data_path": tmp_path / "few.json"}
    settings |= {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 3, "save_steps": 6}
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    run_both(ground, undisturbed, "ddp", batch=2, **settings).finish()
    assert run_both(ground, output, "ddp", batch=2, **settings).kill_when((output / "checkpoint-6").exists)
    run_both(ground, output, "ddp", batch=2, **settings).finish()
    assert_alike(output, undisturbed, steps=12)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("ninja") and shutil.which("c++")), reason="DeepSpeed compiles its optimizer")
@pytest.mark.parametrize("engine", ["zero2_offload", "zero3_offload"])
def test_a_projector_rate_reaches_an_offloaded_optimizer(engine, ground, tmp_path):
    settings = {**STAGE_2, "mm_projector_lr": 1e-4, "weight_decay": 0.1}
    configs = {"deepspeed": REPOSITORY / f"configs/{engine}.json"}
    run_both(ground, tmp_path / "out", "ddp", batch=4, **settings, **configs).finish(400)
    assert_alike(tmp_path / "out", run_alone(ground, "rates", batch=8, **settings))


@pytest.mark.slow
def test_a_rate_that_would_be_lost_is_refused(ground, tmp_path):
    own = json.loads(ZERO3.read_text()) | {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    flags = command(ground, tmp_path / "out", batch=4, **STAGE_2, mm_projector_lr=1e-4, deepspeed=json.dumps(own))
    (process,) = start(flags, tmp_path / "log").ranks
    process.join()
    assert process.exitcode == 1 and "--mm_projector_lr is lost on the optimizer" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_batch_of_broken_samples_has_no_loss(ground, tmp_path):
    settings = {**PLAIN, "data_path": ground / "mixed.json", "max_steps": 21}  # an epoch of batches of one
    start(command(ground, tmp_path / "out", batch=1, **settings), tmp_path / "log").finish()
    assert [loss > 0 for loss in sorted(losses(tmp_path / "out").values())] == [False] + [True] * 20


@pytest.mark.slow
def test_a_zero_checkpoint_is_refused_by_another_engine(ground, tmp_path):
    """One process without DeepSpeed would find no optimizer state that it can read, and begin with a new one."""
    settings = STAGE_2 | {"max_steps": 2, "save_steps": 1}
    run_both(ground, tmp_path / "out", "zero2", batch=4, **settings).finish()
    run = start(command(ground, tmp_path / "out", batch=8, **settings), tmp_path / "log")
    run.ranks[0].join(60)
    assert run.ranks[0].exitcode == 1
    said = (tmp_path / "log").read_text()
    assert "is of another run: engine 'DeepSpeed ZeRO-2', now 'none'; processes 2, now None" in said
