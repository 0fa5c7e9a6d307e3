"""Writes the toy world as MMBench and its translation: a table with the images inside, each question in several
rounds."""

import base64
import csv
from pathlib import Path

from .benchmark_parts import cases, encoded, entry, one_fact, some_options
from .forms import LETTERS, hint
from .questions import CHINESE

ROUND = 1_000_000  # added to MMBench's index for each rotation of the options

COLUMNS = "index question hint A B C D answer category image source l2-category comment split".split()
CATEGORIES = {
    "colour": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "shape": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "count": ("object_localization", "finegrained_perception (instance-level)"),
    "place": ("object_localization", "finegrained_perception (instance-level)"),
    "word": ("ocr", "finegrained_perception (instance-level)"),
    "neighbour": ("spatial_relationship", "finegrained_perception (cross-instance)"),
    "ground": ("image_scene", "coarse_perception"),
}


def write_mmbench(folder: Path, pictures: int, seed: int) -> list[dict]:
    return _write(folder / "mmbench/mmbench_dev_20230712.tsv", pictures, seed, chinese=False)


def write_mmbench_cn(folder: Path, pictures: int, seed: int) -> list[dict]:
    """Writes the same questions, translated."""
    return _write(folder / "mmbench_cn/mmbench_dev_cn_20231003.tsv", pictures, seed, chinese=True)


def _write(table: Path, pictures: int, seed: int, chinese: bool) -> list[dict]:
    rows, truth = [], []
    for number, scene, fact, rng in cases("mmbench", pictures, seed, one_fact):
        options, hinted = some_options(fact, rng.choice((2, 3, 4)), rng), rng.random() < 0.4
        category, ability = CATEGORIES[fact.kind]
        row = {
            "index": 241 + 3 * number,
            "question": fact.chinese if chinese else fact.english,
            "hint": hint(fact, scene, chinese) if hinted else "",
            "category": category,
            "image": base64.b64encode(encoded(scene)).decode(),
            "source": "toy",
            "l2-category": ability,
            "comment": "",
            "split": "dev",
        }
        rows += [_turned(row, fact.answer, options, turn, chinese) for turn in range(len(options))]
    rows.sort(key=lambda row: row["index"] // ROUND)  # all first rounds, then all second ones
    table.parent.mkdir(parents=True)
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    image = f"{table.parent.name}/{table.name}"
    for row in rows:
        means = row[row["answer"]]
        truth.append(entry(row["index"], image, row["question"], row["answer"], row["category"], means=means))
    return truth


def _turned(row: dict, answer: str, options: list[str], turn: int, chinese: bool) -> dict:
    """Returns the row with its options rotated. Circular accuracy counts a question only if all rounds are right."""
    options = options[len(options) - turn :] + options[: len(options) - turn]
    shown = [CHINESE.get(option, option) if chinese else option for option in options]
    letter = LETTERS[options.index(answer)]
    return {**row, **dict(zip(LETTERS, shown)), "index": row["index"] + ROUND * turn, "answer": letter}
