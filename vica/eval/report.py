"""Reports all benchmarks of a run in one table: on screen, as JSON, CSV and Markdown, and as a radar plot."""

import csv
import io
import json
import math
from pathlib import Path

from ..plan.config import ViCAConfig
from ..plan.flops import visual_flops
from ..plan.sizes import visual_tokens
from ..utils.errors import ViCAError
from .answers import write_whole
from .run import Outcome
from .tasks import TASKS

HEADING = ("benchmark", "metric", "score", "of baseline", "visual GFLOPs", "questions", "questions/s")


def summarise(outcomes: list[Outcome], about: dict, config: ViCAConfig, baseline: dict[str, float | None]) -> dict:
    """Returns the summary. `visual_gflops` is the decoder's cost of one image's visual tokens; `baseline` has scores by
    task."""
    rows = []
    for outcome in outcomes:
        value = outcome.score.value if outcome.score else None
        base = baseline.get(outcome.task.name)
        figures = outcome.as_json()
        rows.append(
            dict(
                task=outcome.task.name,
                title=outcome.task.title,
                metric=outcome.score.metric if outcome.score else None,
                score=value,
                full_score=outcome.score.full if outcome.score else None,
                percent_of_baseline=100 * value / base if value is not None and base else None,
                visual_gflops=visual_flops(config, visual_tokens(config)) / 1e9,
                questions=outcome.questions,
                questions_per_s=figures["questions_per_s"],
                failed=len(outcome.failed),
            )
        )
    return dict(about, benchmarks=rows)


def with_earlier(rows: list[dict], path: Path, about: dict) -> list[dict]:
    """Returns the rows together with those of other benchmarks in an earlier summary of the same model and settings."""
    try:
        earlier = json.loads(path.read_bytes())
        known = {row["task"]: row for row in earlier.pop("benchmarks") if row["task"] in TASKS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no summary, or another program's
        return rows
    if earlier != about:
        return rows
    known |= {row["task"]: row for row in rows}
    return [known[name] for name in sorted(known, key=list(TASKS).index)]


def read_baseline(path: Path, counts: dict[str, int]) -> dict[str, float | None]:
    """Returns the scores by task from another run's summary. `counts` holds this run's number of questions by
    benchmark: a percentage of a score on other questions would mislead."""
    try:
        rows = json.loads(path.read_bytes())["benchmarks"]
        scores = {row["task"]: (row["score"], row["questions"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ViCAError(f"{path} is no summary.json of vica eval") from error
    for name, (_, count) in scores.items():
        if counts.get(name, count) != count:
            raise ViCAError(
                f"{path} has {count} questions of {name}, this run {counts[name]}: --limit, --split and the data must "
                "be the same"
            )
    return {name: score for name, (score, _) in scores.items()}


def cells(summary: dict) -> list[tuple]:
    """Returns the table's rows as texts."""

    def shown(value, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        (
            row["title"],
            row["metric"] or "-",
            shown(row["score"], ".2f")
            if not row["failed"]
            else f"{shown(row['score'], '.2f')} ({row['failed']} failed)",
            shown(row["percent_of_baseline"], ".1f") + ("%" if row["percent_of_baseline"] is not None else ""),
            shown(row["visual_gflops"], ".4g"),
            str(row["questions"]),
            shown(row["questions_per_s"], ".1f"),
        )
        for row in summary["benchmarks"]
    ]


def save(summary: dict, folder: Path) -> list[Path]:
    """Writes summary.json, .csv, .md and, if matplotlib is installed and there are at least three scores, .png. Returns
    the paths."""
    rows = cells(summary)
    lines = [HEADING, ("---",) * len(HEADING), *rows]
    texts = {
        "json": json.dumps(summary, indent=1, ensure_ascii=False) + "\n",
        "csv": as_csv(summary["benchmarks"]),
        "md": "".join("| " + " | ".join(line) + " |\n" for line in lines),
    }
    for kind, text in texts.items():
        write_whole(folder / f"summary.{kind}", text)
    paths = [folder / f"summary.{kind}" for kind in texts]
    (folder / "summary.png").unlink(missing_ok=True)  # from an earlier run of other benchmarks
    scored = [row for row in summary["benchmarks"] if row["score"] is not None]
    if len(scored) >= 3 and plot_radar(summary, scored, folder / "summary.png"):
        paths.append(folder / "summary.png")
    return paths


def as_csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plot_radar(summary: dict, rows: list[dict], path: Path) -> bool:
    """Plots a radar chart: percent of the baseline if all have one, else of each benchmark's full score. Returns
    whether it could: it needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = all(row["percent_of_baseline"] is not None for row in rows)
    values = [row["percent_of_baseline"] if compared else 100 * row["score"] / row["full_score"] for row in rows]
    angles = [math.tau * place / len(rows) for place in range(len(rows))]
    figure, axes = pyplot.subplots(figsize=(6, 6), subplot_kw={"projection": "polar"}, layout="constrained")
    axes.plot([*angles, angles[0]], [*values, values[0]])
    axes.fill(angles, values, alpha=0.2)
    axes.set_xticks(angles, [row["title"] for row in rows])
    axes.set_ylim(0, max(100, *values))
    axes.set_title(f"{summary['model']}, {'percent of baseline' if compared else 'percent of the full score'}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
