"""Formats the latency measurement as tables, one a phase, with a line for each column of the measurement."""

import argparse
from dataclasses import dataclass

from ..plan.config import ViCAConfig
from ..plan.flops import prefill_flops
from ..utils.table import table
from .options import COLUMNS, PHASES
from .report import ratio

# The column whose first tokens a column's should equal; in half precision a few differ.
REFEREES = {"dense": "transformers", "accel": "mask", "nothing": "mask", "prefix": "mask", "image": "mask"}
# Titles for phases in which kept parts make no difference.
TITLES = {("tower", "accel"): "ours, plain model"}
TITLES |= {(phase, "prefix"): "ours, accel, engine" for phase in ("tower", "decode", "generate")}
KEPT = {
    "prefix": dict(prefix_kept=True),
    "prefix and image": dict(prefix_kept=True, image_kept=True),
}


@dataclass(frozen=True)
class Setting:
    config: ViCAConfig
    args: argparse.Namespace
    copy_rate: float  # bytes a second, read and written
    product_rate: float  # FLOPs a second
    decoder_bytes: int  # weights that every pass reads

    @property
    def read_ms(self) -> float:
        return 1000 * self.decoder_bytes / self.copy_rate

    def floor_ms(self, batch: int, visual: int, kept: dict) -> float:
        """Returns the least time that the ceilings allow a prefill: all weights read once, or all products at the
        product's rate."""
        flops = batch * prefill_flops(self.config, self.args.prefix, visual, self.args.text, **kept).total
        return max(self.read_ms, 1000 * flops / self.product_rate)


def phase_table(phase: str, cells: list[dict], setting: Setting) -> str:
    cells = [cell for cell in cells if cell["phase"] == phase]
    over = "visual" if phase == "visual" else "batch"
    places = list(dict.fromkeys((c["batch"], c["visual"]) for c in cells))
    known = {(cell["column"], (cell["batch"], cell["visual"])): cell for cell in cells}
    rows = [("", *(f"{over} {visual if over == 'visual' else batch}" for batch, visual in places))]
    for column in (c for c in COLUMNS if any(cell["column"] == c for cell in cells)):
        entries = (entry(known[column, at], known.get(("transformers", at))) for at in places)
        rows.append((TITLES.get((phase, column), COLUMNS[column]), *entries))
    if phase in ("prefill", "visual"):
        for name, kept in KEPT.items():
            rows.append((f"  floor, {name} kept", *(f"{setting.floor_ms(*at, kept):.2f} {'':6}" for at in places)))
    if phase in ("decode", "generate") and ("prefix", places[0]) in known:
        shares = (known["prefix", at].get("bandwidth_share") for at in places)
        rows.append(("  its share of the copy rate, weights once", *(f"{100 * s:.0f}%" if s else "-" for s in shares)))
    name = PHASES[phase].format(args=setting.args, visual=places[0][1])
    return "\n".join([name, "", table(rows), *notes(cells)])


def entry(cell: dict, peer: dict | None) -> str:
    """Returns milliseconds, and the speedup over transformers."""
    if not cell["ms"]:
        return cell["failure"] if cell["failure"] == "out of memory" else "see below"
    return f"{cell['ms']:.2f} {ratio(cell['ms'], peer and peer['ms']):>6}"


def notes(cells: list[dict]) -> list[str]:
    failures = dict.fromkeys((c["column"], c["failure"]) for c in cells if c["failure"])
    lines = [f"{column}: {failure}" for column, failure in failures if failure != "out of memory"]
    for column, referee in REFEREES.items():
        shares = [c["as_referee"] for c in cells if c["column"] == column and "as_referee" in c]
        if shares:
            lines.append(f"{column}: first tokens as {referee}'s in {100 * sum(shares) / len(shares):.1f}%")
    return lines


def ceilings(setting: Setting) -> str:
    return (
        f"measured ceilings: copy {setting.copy_rate / 1e12:.3g} TB/s (read and written), "
        f"product {setting.product_rate / 1e12:.4g} TFLOP/s; decoder weights {setting.decoder_bytes / 1e9:.3g} GB"
    )
