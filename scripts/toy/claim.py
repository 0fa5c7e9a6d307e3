"""Reports accuracy by kind of question, visual FLOPs and training time of the runs that scripts/toy.sh made."""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

from vica.plan.config import ViCAConfig
from vica.plan.flops import visual_flops
from vica.plan.sizes import visual_tokens
from vica.utils.errors import ViCAError
from vica.utils.files import read_json
from vica.utils.program import exit_status

ORDER = ("dense", "vica", "random", "blind")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.toy.claim", description=__doc__)
    parser.add_argument("runs", type=Path, help="folder that holds NAME-SEED/score.json and NAME-SEED/model")
    parser.add_argument("--out", type=Path, required=True, help="folder for claim.json, claim.md and claim.png")
    return exit_status("scripts.toy.claim", lambda: run(parser.parse_args(argv)))


def run(args) -> None:
    runs = read_runs(args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "claim.json").write_text(json.dumps(runs, indent=1) + "\n")
    text = markdown(runs)
    (args.out / "claim.md").write_text(text)
    plot(runs, args.out / "claim.png")
    print(text)


def read_runs(folder: Path) -> list[dict]:
    found = sorted(folder.glob("*/score.json"))
    if not found:
        raise ViCAError(f"{folder} holds no NAME-SEED/score.json")
    return [read_run(path.parent) for path in found]


def read_run(folder: Path) -> dict:
    name, _, seed = folder.name.rpartition("-")
    if not (name and seed.isdecimal()):
        raise ViCAError(f"{folder} holds a score.json, but its name is no NAME-SEED, such as vica-0")
    config = ViCAConfig.from_dict(read_json(folder / "model" / "config.json"))
    state = read_json(folder / "model" / "trainer_state.json")
    history = state["log_history"]
    return dict(
        name=name,
        seed=int(seed),
        t2v_layers=config.t2v_layers if config.variant != "dense" else None,
        visual_flops=visual_flops(config, visual_tokens(config)),
        seconds=training_seconds(history, state["train_batch_size"]),
        steps=history[-1]["step"],
        loss=next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
        score=read_json(folder / "score.json"),
    )


def training_seconds(history: list[dict], batch: int) -> float:
    """Returns the seconds of the second stage, on one card, over all parts of an interrupted run: `train_runtime` is
    that of the last part alone."""
    measured = [entry for entry in history if "samples_per_s" in entry]
    steps = (after - before for before, after in pairwise([0, *(entry["step"] for entry in measured)]))
    return sum(count * batch / entry["samples_per_s"] for count, entry in zip(steps, measured))


def markdown(runs: list[dict]) -> str:
    names = [name for name in ORDER if any(run["name"] == name for run in runs)]
    of = {name: [run for run in runs if run["name"] == name] for name in names}
    kinds = list(runs[0]["score"])
    rows = [["%", *names], ["---"] * (len(names) + 1)]
    rows += [[kind, *(spread([share(run, kind) for run in of[name]]) for name in names)] for kind in kinds]
    if "dense" in of:
        base, flops = mean(share(run, "all") for run in of["dense"]), of["dense"][0]["visual_flops"]
        overall = [mean(share(run, "all") for run in of[name]) for name in names]
        rows.append(["of dense's accuracy", *(f"{x / base:.1%}" if base else "-" for x in overall)])
        rows.append(["of dense's visual FLOPs", *(f"{of[n][0]['visual_flops'] / flops:.1%}" for n in names)])
    rows.append(["training, s", *(f"{mean(run['seconds'] for run in of[name]):.0f}" for name in names)])
    rows.append(["seeds", *(str(len(of[name])) for name in names)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def share(run: dict, kind: str) -> float:
    right, of = run["score"][kind]
    return 100 * right / of


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def plot(runs: list[dict], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise ViCAError("the plot needs matplotlib: pip install 'vica[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in ORDER if any(run["name"] == name for run in runs)]
    kinds = list(runs[0]["score"])
    figure, axes = pyplot.subplots(figsize=(11, 4), layout="constrained")
    for place, name in enumerate(names):
        values = [[share(run, kind) for run in runs if run["name"] == name] for kind in kinds]
        at = [x + (place - (len(names) - 1) / 2) * 0.8 / len(names) for x in range(len(kinds))]
        axes.bar(at, [mean(v) for v in values], 0.8 / len(names), label=name)
        axes.scatter([x for x, v in zip(at, values) for _ in v], [y for v in values for y in v], s=6, color="black")
    axes.set_xticks(range(len(kinds)), [kind.replace("_", "\n") for kind in kinds])
    axes.set(ylabel="right answers, %", ylim=(0, 100))
    figure.legend(loc="outside upper center", ncols=len(names))  # bars fill the axes
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
