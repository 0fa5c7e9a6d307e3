"""Writes toy benchmarks answered by yes or no, both equally often: MME and POPE, in their authors' file formats."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

from .benchmark_parts import cases, entry, facts, line, save_picture, write_lines
from .questions import OPPOSITES, SHORT_ANSWER, stands
from .world import COLOURS, SHAPES, Scene

POPE_SPLITS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}  # LLaVA adds this to a split's ids


def _claims(kind: str) -> Callable:
    """Returns a function that makes a right and a wrong claim of one kind."""

    def make(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
        fact = facts(scene, rng).get(kind)
        return None if fact is None else (fact.claim.format(fact.answer), fact.claim.format(fact.wrong[0]))

    return make


def _presence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return _is_there(rng.choice(_present(scene))), _is_there(rng.choice(_absent(scene)))


def _order(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    pairs = permutations(scene.things, 2)
    found = [(one, relation, other) for one, other in pairs for relation in OPPOSITES if stands(one, relation, other)]
    if not found:
        return None
    thing, relation, other = rng.choice(found)
    right, wrong = (f"Is the {thing.name} {asked} the {other.name}?" for asked in (relation, OPPOSITES[relation]))
    return right, wrong


# Official categories. Those with True keep images and questions in two separate folders.
MME_CATEGORIES = {
    "existence": (_presence, False),
    "count": (_claims("count"), False),
    "position": (_order, False),
    "color": (_claims("colour"), False),
    "OCR": (_claims("word"), False),
    "scene": (_claims("ground"), True),
    "artwork": (_claims("shape"), True),
    "commonsense_reasoning": (_claims("neighbour"), False),
}


def write_mme(folder: Path, pictures: int, seed: int) -> list[dict]:
    """Writes MME. The pictures go to the categories in turn; each has two questions, of which one is true."""
    lines, truth, release = [], [], "MME/MME_Benchmark_release_version"
    for turn, (category, (make, apart)) in enumerate(MME_CATEGORIES.items()):
        count = len(range(turn, pictures, len(MME_CATEGORIES)))
        for index, scene, claims, rng in cases(f"mme {category}", count, seed, make):
            name = f"{index + 1:04}.{'png' if category == 'commonsense_reasoning' else 'jpg'}"
            image = f"{category}/images/{name}" if apart else f"{category}/{name}"
            save_picture(scene, folder / release / image)
            asked = [*zip(claims, ("Yes", "No"))]
            rng.shuffle(asked)
            _write_mme_pair(folder / release / image, category, asked)
            lines += [line(image, image, f"{claim}\n{SHORT_ANSWER}", category) for claim, _ in asked]
            truth += [entry(image, f"{release}/{image}", claim, answer.lower(), category) for claim, answer in asked]
    write_lines(folder / "MME/llava_mme.jsonl", lines)
    return truth


def _write_mme_pair(image: Path, category: str, asked: list[tuple[str, str]]) -> None:
    beside = image.parent.with_name("questions_answers_YN") if image.parent.name == "images" else image.parent
    beside.mkdir(exist_ok=True)
    space = "  " if category == "count" else " "  # a few of the real questions have two spaces there
    text = "".join(f"{claim}{space}Please answer yes or no.\t{answer}\n" for claim, answer in asked)
    (beside / f"{image.stem}.txt").write_text(text, encoding="utf-8")


def write_pope(folder: Path, pictures: int, seed: int) -> list[dict]:
    """Writes POPE, with half as many pictures, since each is used in three splits: each time with something present,
    and with something absent that is random, frequent in other pictures, or similar to something present."""
    scenes = [(index, scene, rng) for index, scene, _, rng in cases("pope", (pictures + 1) // 2, seed, lambda *_: True)]
    frequency = Counter(pair for _, scene, _ in scenes for pair in _present(scene))
    records: dict[str, list[dict]] = {split: [] for split in POPE_SPLITS}
    for index, scene, rng in scenes:
        image = f"COCO_val2014_{310196 + 1021 * index:012}.jpg"
        save_picture(scene, folder / "pope/val2014" / image)
        present = rng.choice(_present(scene))
        for split, absent in _absent_by_split(scene, frequency, rng).items():
            number = len(records[split]) + 1
            records[split].append(_pope_record(number, image, present, "yes"))
            records[split].append(_pope_record(number + 1, image, absent, "no"))
    lines, truth = [], []
    for split, first_id in POPE_SPLITS.items():
        write_lines(folder / f"pope/coco/coco_pope_{split}.json", records[split])
        for record in records[split]:
            id, image, question = first_id + record["question_id"], record["image"], record["text"]
            lines.append(line(id, image, f"{question}\n{SHORT_ANSWER}", split))
            truth.append(entry(id, f"pope/val2014/{image}", question, record["label"], split))
    write_lines(folder / "pope/llava_pope_test.jsonl", lines)
    return truth


def _absent_by_split(scene: Scene, frequency: Counter, rng: random.Random) -> dict[str, tuple[str, str]]:
    absent = _absent(scene)
    rng.shuffle(absent)
    return {
        "random": absent[0],
        "popular": max(absent, key=frequency.__getitem__),
        "adversarial": max(absent, key=lambda pair: _likeness(pair, scene)),
    }


def _pope_record(number: int, image: str, pair: tuple[str, str], label: str) -> dict:
    return {"question_id": number, "image": image, "text": _is_there(pair), "label": label}


def _present(scene: Scene) -> list[tuple[str, str]]:
    return [(thing.colour, thing.shape) for thing in scene.things]


def _absent(scene: Scene) -> list[tuple[str, str]]:
    return [pair for pair in product(COLOURS, SHAPES) if pair not in _present(scene)]


def _likeness(pair: tuple[str, str], scene: Scene) -> int:
    return sum(thing.colour == pair[0] or thing.shape == pair[1] for thing in scene.things)


def _is_there(pair: tuple[str, str]) -> str:
    colour, shape = pair
    return f"Is there {'an' if colour == 'orange' else 'a'} {colour} {shape} in the image?"
