"""Plots the training loss."""

import logging
from pathlib import Path

log = logging.getLogger(__name__)
SMOOTHED = 0.95  # share of the past in the plotted mean


def plot(path: Path, history: list[dict]) -> None:
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if not points:
        return
    try:
        import matplotlib
    except ImportError:
        log.warning("no picture of the loss: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = zip(*points)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="loss")
    axes.plot(steps, smooth(losses), color="tab:blue", label=f"mean (the past counts {SMOOTHED:.0%})")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def smooth(values) -> list[float]:
    means, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = SMOOTHED * mean + (1 - SMOOTHED) * value, SMOOTHED * weight + 1 - SMOOTHED
        means.append(mean / weight)
    return means
