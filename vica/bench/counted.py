"""Counts the FLOPs of a prompt by formula from the config alone."""

import argparse

from ..plan.config import ViCAConfig
from ..plan.flops import dense, prefill_flops, visual_flops
from ..plan.sizes import visual_tokens
from ..utils.table import table
from .report import Report

WAYS = {
    "dense": {},
    "accel, nothing kept": {},
    "accel, prefix kept": dict(prefix_kept=True),
    "accel, prefix and image kept": dict(prefix_kept=True, image_kept=True),
}


def run(args: argparse.Namespace, config: ViCAConfig) -> Report:
    own = visual_tokens(config) or 576
    cells = [
        cell for visual in args.visual or [own, 1152, 2880] for cell in count(config, args.prefix, visual, args.text)
    ]
    return Report(
        [whole_table(cells, args), visual_table(cells, args)],
        dict(prefix=args.prefix, text=args.text, cells=cells),
    )


def count(config: ViCAConfig, prefix: int, visual: int, text: int) -> list[dict]:
    cells = []
    for name, kept in WAYS.items():
        wired = dense(config) if name == "dense" else config
        flops = prefill_flops(wired, prefix, visual, text, **kept)
        side = 0 if kept.get("image_kept") else visual_flops(wired, visual, prefix)
        cells.append(
            dict(
                way=name,
                visual=visual,
                flops=flops.total,
                linear=flops.linear,
                attention=flops.attention,
                visual_flops=side,
            )
        )
    return cells


def whole_table(cells: list[dict], args: argparse.Namespace) -> str:
    heads, known = tabulated(cells)
    rows = [("", *(f"{visual} visual" for visual in heads))]
    for way in WAYS:
        entries = [(known[way, v]["flops"], known["dense", v]["flops"]) for v in heads]
        rows.append((way, *(f"{own / 1e12:.3f} {full / own:5.1f}x" for own, full in entries)))
    return (
        f"prefill of {args.prefix} + visual + {args.text} tokens to the first token, TFLOPs, and dense's against it\n\n"
        f"{table(rows)}\ncounted: linear maps, attention of pairs that see each other, the last row's vocabulary"
    )


def visual_table(cells: list[dict], args: argparse.Namespace) -> str:
    heads, known = tabulated(cells)
    rows = [("", *(f"{visual} visual" for visual in heads))]
    for way in ("dense", "accel, nothing kept"):
        entries = [(known[way, v]["visual_flops"], known["dense", v]["visual_flops"]) for v in heads]
        rows.append((way.split(",")[0], *(f"{own / 1e12:.3f} {100 * own / full:5.1f}%" for own, full in entries)))
    return (
        "the visual side of it, as the paper counts: the visual tokens' own rows, TFLOPs, and the share of dense's\n\n"
        + table(rows)
    )


def tabulated(cells: list[dict]) -> tuple[list[int], dict[tuple[str, int], dict]]:
    return list(dict.fromkeys(c["visual"] for c in cells)), {(c["way"], c["visual"]): c for c in cells}
