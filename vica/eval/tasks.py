"""The table of benchmarks by name."""

from ..utils.errors import ViCAError
from . import gqa, mmbench, mme, pope, seed, sqa, textvqa, vqav2
from .task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        vqav2.TASK,
        gqa.TASK,
        sqa.TASK,
        textvqa.TASK,
        pope.TASK,
        mme.TASK,
        mmbench.ENGLISH,
        mmbench.CHINESE,
        seed.TASK,
    )
}


def choose(names: list[str]) -> list[Task]:
    for name in names:
        if name not in (*TASKS, "all"):
            raise ViCAError(
                f"there is no benchmark {name!r}; there are {', '.join(TASKS)}, and all of them together: all"
            )
    return list(TASKS.values()) if "all" in names else [TASKS[name] for name in dict.fromkeys(names)]
