"""Runs programs in processes that may be killed. They are forked from a process that has done the imports: a run on a
toy world takes one second of work after eight of imports."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training import LAYERS, write_base
from vica.toy.write import write
from vica.train.run import main

FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["tests.forks", "vica.cli.main", "deepspeed", "peft", "matplotlib.pyplot"]
ON_CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@dataclass
class Run:
    """The processes of one run, each the leader of a process group of its own."""

    ranks: list
    log: Path

    def finish(self, seconds: float = 120) -> None:
        for process in self.ranks:
            process.join(seconds)
        codes = [process.exitcode for process in self.ranks]
        self.kill()
        assert codes == [0] * len(codes), f"exit codes {codes}:\n{self.log.read_text()[-4000:]}"

    def steps_logged(self) -> int:
        return self.log.read_text().count("{'loss'") if self.log.exists() else 0

    def running(self) -> bool:
        return all(process.is_alive() for process in self.ranks)

    def kill(self) -> None:
        """Kills (kill -9) every rank and all processes that it has started."""
        for process in self.ranks:
            if process.is_alive():
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # it has not made its group yet
                    process.kill()
            process.join()

    def kill_when(self, happens: Callable[[], bool], after: float = 0.0, seconds: float = 120) -> bool:
        """Kills the run `after` seconds from the event. Returns False if the run had ended well before that."""
        deadline = time.monotonic() + seconds
        while self.running() and not happens():
            time.sleep(0.001)
            assert time.monotonic() < deadline, f"nothing happens:\n{self.log.read_text()[-4000:]}"
        time.sleep(after)
        if self.running():
            self.kill()
            return True
        self.finish()
        return False


def start(
    argv: list[str],
    log: Path,
    ranks: int = 1,
    sabotage: Callable[[], None] | None = None,
    program: Callable[[list[str]], int] = main,
) -> Run:
    """Starts training, or another program. `sabotage` is called first in the new processes."""
    FORKS.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ON_CPU.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": ranks}
    places = [{**address, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)] if ranks > 1 else [{}]
    processes = [FORKS.Process(target=work, args=(program, argv, place, log, sabotage)) for place in places]
    for process in processes:
        process.start()
    return Run(processes, log)


def work(
    program: Callable[[list[str]], int],
    argv: list[str],
    environment: dict,
    log: Path,
    sabotage: Callable[[], None] | None,
) -> None:
    os.setpgrp()
    multiprocessing.set_start_method(None, force=True)  # restores the usual way of starting a loader's workers
    os.environ.update({name: str(value) for name, value in environment.items()})
    written = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(written, sys.stdout.fileno())
    os.dup2(written, sys.stderr.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # the test reads the log while it grows
    torch.set_num_threads(1)
    if sabotage is not None:
        sabotage()
    code = program(argv)
    sys.stdout.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def make_ground(root: Path) -> Path:
    """Makes the common starting point of all runs: a toy world, a language model, a tower, and a projector of stage
    1."""
    write(root / "world", 300, 1)
    write_base(root)
    start(argv(root, root / "stage1", **STAGE_1, max_steps=2, save_steps=100), root / "stage1.log").finish()
    return root


STAGE_1 = {"stage": "pretrain", "version": "plain"}
STAGE_2 = {"stage": "finetune", "version": "v1", "group_by_modality_length": True}


def argv(root: Path, output: Path, **settings) -> list[str]:
    """Returns a command line on `root` (of `make_ground`); `settings` override its own."""
    stage_1 = settings["stage"] == "pretrain"
    common = {
        "model_name_or_path": root / "llm",
        "vision_tower": root / "tower",
        "data_path": root / "world" / ("pretrain.json" if stage_1 else "finetune.json"),
        "image_folder": root / "world" / "images",
        "t2v_layers": LAYERS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "output_dir": output,
    }
    if not stage_1:
        common["pretrain_mm_mlp_adapter"] = root / "stage1"
    return [part for name, value in (common | settings).items() for part in (f"--{name}", str(value))]


def losses(output: Path) -> dict[int, float]:
    """Returns the losses by step, each step once."""
    found = [
        entry for entry in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]
    assert len({entry["step"] for entry in found}) == len(found)
    return {entry["step"]: entry["loss"] for entry in found}


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Returns the saved weights of a finished run, by file."""
    files = [*output.glob("*.safetensors"), *output.glob("*.bin")]
    state = {}
    for file in sorted(files):
        if file.name != "training_args.bin":
            read = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
            state |= {f"{file.name} {name}": tensor for name, tensor in read.items()}
    return state


def distance(one: dict, other: dict) -> float:
    """Returns the largest difference of losses, or of weights, under the same names."""
    assert one and one.keys() == other.keys()
    return max(float(torch.as_tensor(one[name] - other[name]).abs().max()) for name in one)
