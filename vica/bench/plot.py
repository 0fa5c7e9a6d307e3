"""Plots the times of the latency measurement against the batch, and against an image's visual tokens."""

from ..utils.errors import ViCAError
from .options import COLUMNS

# Phase of the cells, quantity on the x axis, its label, title of the panel.
PANELS = (
    ("prefill", "batch", "batch", "prefill, {visual} visual tokens"),
    ("visual", "visual", "visual tokens an image", "prefill, batch {batch}"),
    ("first", "batch", "batch", "first token from pixels"),
    ("decode", "batch", "batch", "decode, a step"),
)


def require():
    """Returns pyplot. Only plots need matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ViCAError("--plot needs matplotlib: pip install 'vica[bench]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def save_plot(path: str, cells: list[dict], title: str) -> None:
    pyplot = require()
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    panels = [p for p in PANELS if any(cell["phase"] == p[0] and cell["ms"] for cell in cells)]
    if not panels:
        raise ViCAError("--plot: nothing was measured that it shows (prefill, visual, first or decode)")
    wide, high = min(2, len(panels)), -(-len(panels) // 2)
    figure, axes = pyplot.subplots(high, wide, figsize=(6.4 * wide, 4.4 * high + 1.2), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (phase, over, label, name) in zip(axes.flat, panels):
        shown = [cell for cell in cells if cell["phase"] == phase]
        plot_lines(axis, shown, over)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="ms", title=name.format(**shown[0]))
        ticks = sorted({cell[over] for cell in shown})
        axis.set_xticks(ticks, labels=map(str, ticks))
        axis.set_xticks([], minor=True)
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=ScalarFormatter())
        axis.yaxis.set(minor_formatter=NullFormatter())
        axis.grid(True, which="both", alpha=0.25)
    named = {name: line for axis in figure.axes for line, name in zip(*axis.get_legend_handles_labels())}
    columns = min(2 * wide, len(named))
    figure.legend(named.values(), named.keys(), loc="lower center", ncols=columns, frameon=False)
    figure.suptitle(title)
    legend = 0.3 * -(-len(named) // columns) / figure.get_figheight()
    figure.tight_layout(rect=(0, legend, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_lines(axis, cells: list[dict], over: str) -> None:
    for place, (column, name) in enumerate(COLUMNS.items()):
        points = sorted((cell[over], cell["ms"]) for cell in cells if cell["column"] == column and cell["ms"])
        if points:
            axis.plot(*zip(*points), label=name.strip(), color=f"C{place}", marker="osD^v<>*Xp"[place], markersize=5)
