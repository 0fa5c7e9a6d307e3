"""Tests vica eval, killed (kill -9) at any moment and restarted by the same command: with one process and with two it
ends with the undisturbed run's files and scores."""

import contextlib
import json
from pathlib import Path
from random import Random

import pytest

from tests.evaluation import model_and_data
from tests.forks import start
from vica.cli.main import main
from vica.eval.answers import FINAL, PARTS
from vica.utils.files import held

TASKS = ("pope", "mme")


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return model_and_data(tmp_path_factory.mktemp("ground"), 12)


def command(ground: Path, out: Path) -> list[str]:
    folders = ["--model", str(ground / "model"), "--data", str(ground / "data"), "--out", str(out)]
    return ["eval", *TASKS, *folders, "--max-batch", "2", "--max-new-tokens", "5"]


def begin(ground: Path, out: Path, processes: int):
    return start(command(ground, out), out.with_suffix(".log"), processes, program=main)


def files(out: Path) -> dict[str, bytes]:
    """Returns the answers, and the scores without the times."""
    found = {task: (out / task / FINAL).read_bytes() for task in TASKS}
    for task in TASKS:
        result = json.loads((out / task / "result.json").read_text())
        found[f"{task} score"] = json.dumps([result[key] for key in ("task", "questions", "score", "failed")]).encode()
    return found


def answered(out: Path) -> int:
    """Returns the number of lines in the parts. A running process may join a part, and so remove it, between listing
    and reading."""
    lines = 0
    for part in out.glob(f"*/{PARTS}"):
        with contextlib.suppress(FileNotFoundError):
            lines += part.read_bytes().count(b"\n")
    return lines


@pytest.fixture(scope="module")
def undisturbed(ground):
    begin(ground, ground / "undisturbed", 1).finish()
    return files(ground / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("processes", (1, 2))
def test_killed_at_ten_moments(processes, ground, undisturbed, tmp_path):
    out, dice, killed, kept = tmp_path / "out", Random(processes), 0, []
    total = sum(undisturbed[task].count(b"\n") for task in TASKS)
    for place in range(10):
        seen = answered(out)
        wanted = seen + dice.randint(0, max(1, total // 12))
        run = begin(ground, out, processes)
        killed += run.kill_when(lambda: answered(out) > wanted or finished(out), after=0.03 * dice.random())  # noqa: B023
        kept.append(answered(out))
        if place % 3 == 2:  # a truncated line
            for part in out.glob(f"*/{PARTS}"):
                part.write_bytes(part.read_bytes()[:-3])
    begin(ground, out, processes).finish()
    assert files(out) == undisturbed
    assert killed >= 8 and max(kept) > total // 3
    assert not list(out.glob(f"*/{PARTS}"))


def finished(out: Path) -> bool:
    return (out / "summary.json").exists()


def test_two_processes_answer_as_one(ground, undisturbed, tmp_path):
    begin(ground, tmp_path / "out", 2).finish()
    assert files(tmp_path / "out") == undisturbed


def fail_in_the_second() -> None:
    import os

    import vica.eval.answering as answering

    if os.environ["RANK"] == "1":

        def broken(*_, **__):
            raise RuntimeError("this process cannot go on")
            yield

        answering.by_engine = broken


def test_a_refusal_is_one_line_for_each_process(ground, tmp_path):
    (tmp_path / "out" / TASKS[0]).mkdir(parents=True)
    (tmp_path / "out" / TASKS[0] / "run.json").write_text('{"model": "another"}')
    run = start(command(ground, tmp_path / "out"), tmp_path / "out.log", 2, program=main)
    for process in run.ranks:
        process.join(60)
    assert [process.exitcode for process in run.ranks] == [1, 1]
    said = sorted((tmp_path / "out.log").read_text().splitlines(), key=len)
    assert len(said) == 2 and all(line.startswith("vica eval: ") for line in said)
    assert sum("holds answers of another run: model " in line for line in said) == 1
    assert sum("process 2 of 2 stops, because another one has" in line for line in said) == 1


def late_in_the_first() -> None:
    import os
    import time

    from vica.cli import eval

    if os.environ["RANK"] == "0":
        folder_of_its_own = eval.held

        def held_late(folder, mend):
            time.sleep(1)
            return folder_of_its_own(folder, mend)

        eval.held = held_late


def test_a_restart_removes_nothing_of_a_running_run(ground, tmp_path):
    """The process that notices the other run may be the last to arrive."""
    part = tmp_path / "out" / TASKS[0] / PARTS.replace("*", "0000")
    with held(part.parent, "--out"):
        part.write_text("{}\n")
        argv = [*command(ground, tmp_path / "out"), "--restart"]
        run = start(argv, tmp_path / "out.log", 2, sabotage=late_in_the_first, program=main)
        for process in run.ranks:
            process.join(60)
        assert [process.exitcode for process in run.ranks] == [1, 1]
        assert part.exists()
    assert "is being written by another run" in (tmp_path / "out.log").read_text()


def test_a_failing_process_ends_with_its_reason(ground, tmp_path):
    """torchrun ends the other processes as soon as one has failed. This test checks that the process fails, with its
    reason."""
    log = tmp_path / "out.log"
    run = start(command(ground, tmp_path / "out"), log, 2, sabotage=fail_in_the_second, program=main)
    run.ranks[1].join(60)
    assert run.ranks[1].exitcode not in (0, None)
    run.kill()
    assert "this process cannot go on" in log.read_text()
    assert not (tmp_path / "out" / TASKS[0] / FINAL).exists()
