"""Toy benchmarks answered by an option's letter: MMBench in both languages, SEED-Bench and ScienceQA."""

import base64
import csv
import random
from pathlib import Path

from .benchmark_parts import cases, encoded, entry, facts, line, save_picture, write_json, write_lines
from .language import text_question
from .questions import CHINESE, LETTER, Fact
from .world import Scene

LETTERS = "ABCD"
ROUND = 1_000_000  # added to MMBench's index with each turn of the options

MMBENCH_COLUMNS = "index question hint A B C D answer category image source l2-category comment split".split()
MMBENCH_CATEGORIES = {
    "colour": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "shape": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "count": ("object_localization", "finegrained_perception (instance-level)"),
    "place": ("object_localization", "finegrained_perception (instance-level)"),
    "word": ("ocr", "finegrained_perception (instance-level)"),
    "neighbour": ("spatial_relationship", "finegrained_perception (cross-instance)"),
    "ground": ("image_scene", "coarse_perception"),
}

SEED_TYPES = {
    "Scene Understanding": 1,
    "Instance Identity": 2,
    "Instance Attributes": 3,
    "Instance Location": 4,
    "Instances Counting": 5,
    "Spatial Relation": 6,
    "Instance Interaction": 7,
    "Visual Reasoning": 8,
    "Text Understanding": 9,
    "Action Recognition": 10,
    "Action Prediction": 11,
    "Procedure Understanding": 12,
}
SEED_KINDS = {
    "ground": "Scene Understanding",
    "shape": "Instance Identity",
    "colour": "Instance Attributes",
    "place": "Instance Location",
    "count": "Instances Counting",
    "neighbour": "Spatial Relation",
    "word": "Text Understanding",
}


def _one_fact(scene: Scene, rng: random.Random) -> Fact:
    return rng.choice([*facts(scene, rng).values()])


def _two_facts(scene: Scene, rng: random.Random) -> list[Fact]:
    return rng.sample([*facts(scene, rng).values()], 2)


def _options(fact: Fact, count: int, rng: random.Random) -> list[str]:
    options = [fact.answer, *fact.wrong[: count - 1]]
    rng.shuffle(options)
    return options


def _listed(options: list[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))


def _hint(fact: Fact, scene: Scene, chinese: bool = False) -> str:
    """What the question does not ask; a line each."""
    lines = []
    if fact.kind != "ground":
        lines.append(f"图片的背景是{CHINESE[scene.ground]}。" if chinese else f"The background is {scene.ground}.")
    if fact.kind != "word" and scene.word:
        word = scene.word.text
        lines.append(f"图中写的是{word}。" if chinese else f"The word {word} is written in the image.")
    return "\n".join(lines)


def write_mmbench(folder: Path, pictures: int, seed: int) -> list[dict]:
    return _write_mmbench(folder / "mmbench/mmbench_dev_20230712.tsv", pictures, seed, chinese=False)


def write_mmbench_cn(folder: Path, pictures: int, seed: int) -> list[dict]:
    """The same questions, translated."""
    return _write_mmbench(folder / "mmbench_cn/mmbench_dev_cn_20231003.tsv", pictures, seed, chinese=True)


def _write_mmbench(table: Path, pictures: int, seed: int, chinese: bool) -> list[dict]:
    rows, truth = [], []
    for number, scene, fact, rng in cases("mmbench", pictures, seed, _one_fact):
        options, hinted = _options(fact, rng.choice((2, 3, 4)), rng), rng.random() < 0.4
        category, ability = MMBENCH_CATEGORIES[fact.kind]
        row = {
            "index": 241 + 3 * number,
            "question": fact.chinese if chinese else fact.english,
            "hint": _hint(fact, scene, chinese) if hinted else "",
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
        writer = csv.DictWriter(file, MMBENCH_COLUMNS, restval="", delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    image = f"{table.parent.name}/{table.name}"
    for row in rows:
        means = row[row["answer"]]
        truth.append(entry(row["index"], image, row["question"], row["answer"], row["category"], means=means))
    return truth


def _turned(row: dict, answer: str, options: list[str], turn: int, chinese: bool) -> dict:
    """Each round moves the options by one place; circular accuracy counts who is right in all rounds."""
    options = options[len(options) - turn :] + options[: len(options) - turn]
    shown = [CHINESE.get(option, option) if chinese else option for option in options]
    letter = LETTERS[options.index(answer)]
    return {**row, **dict(zip(LETTERS, shown)), "index": row["index"] + ROUND * turn, "answer": letter}


def write_seed(folder: Path, pictures: int, seed: int) -> list[dict]:
    records, lines, truth = [], [], []
    for index, scene, asked, rng in cases("seed", pictures, seed, _two_facts):
        name = f"{1454426 + 7 * index}_{rng.getrandbits(32)}"  # a JPEG without suffix, as all of SEED-Bench
        save_picture(scene, folder / "seed_bench/SEED-Bench-image" / name)
        for place, fact in enumerate(asked):
            id, options, kind = 101669 + 10 * index + place, _options(fact, 4, rng), SEED_KINDS[fact.kind]
            letter, image = LETTERS[options.index(fact.answer)], f"SEED-Bench-image/{name}"
            records.append(_seed_record(str(id), name, kind, fact.english, options, letter, "image"))
            lines.append(line(id, image, f"{fact.english}\n{_listed(options)}\n{LETTER}", kind))  # a number here only
            truth.append(entry(id, f"seed_bench/{image}", fact.english, letter, kind, means=fact.answer))
    videos = _seed_videos(max(3, pictures // 4))
    for video in videos:
        options = [video[f"choice_{letter.lower()}"] for letter in LETTERS]
        image = f"SEED-Bench-video-image/{video['question_type_id']}_{video['question_id']}.png"
        kind = next(name for name, id in SEED_TYPES.items() if id == video["question_type_id"])
        lines.append(line(video["question_id"], image, f"{video['question']}\n{_listed(options)}\n{LETTER}", kind))
    write_lines(folder / "seed_bench/llava-seed-bench.jsonl", lines)
    write_json(folder / "seed_bench/SEED-Bench.json", {"questions": records + videos, "question_type": SEED_TYPES})
    return truth


def _seed_record(id: str, data: str, kind: str, words: str, options: list[str], letter: str, medium: str) -> dict:
    return {
        "answer": letter,
        **{f"choice_{letter.lower()}": option for letter, option in zip(LETTERS, options)},
        "data_id": data,
        "data_type": medium,
        "question": words,
        "question_id": id,
        "question_type_id": SEED_TYPES[kind],
    }


def _seed_videos(count: int) -> list[dict]:
    """Listed as in the real file, without any frame: an evaluation on images leaves them out."""
    kinds = ("Action Recognition", "Action Prediction", "Procedure Understanding")
    videos = []
    for index in range(count):
        kind, words = kinds[index % 3], "What colour is the background?"
        record = _seed_record(
            f"v{index}", f"{index}.webm", kind, words, ["white", "grey", "black", "brown"], "A", "video"
        )
        videos.append(record if index % 3 == 0 else {**record, "segment": [18, 166]})
    return videos


def write_sqa(folder: Path, pictures: int, seed: int) -> list[dict]:
    """To each three problems with a picture one without. The train split, which nobody asks, has none at all."""
    problems, samples, truth = {}, [], []
    for index, scene, fact, rng in cases("sqa", pictures, seed, _one_fact):
        options = _options(fact, rng.choice((2, 3, 4)), rng)
        hint = _hint(fact, scene) if rng.random() < 0.4 else ""
        id = str(4 + 5 * index)
        problems[id] = _problem(fact.english, options, options.index(fact.answer), hint, "image.png")
        save_picture(scene, folder / f"scienceqa/images/test/{id}/image.png")
        if index % 3 == 0:
            id = str(int(id) + 1)
            problems[id] = _text_problem(rng, "test")
    test = list(problems)
    train = {str(int(id) + 2): _text_problem(random.Random(f"{seed} {id}"), "train") for id in test[:3]}
    for id in test:
        problem = problems[id]
        letter, image = LETTERS[problem["answer"]], problem["image"] and f"{id}/image.png"
        samples.append(_sqa_sample(id, image, problem, letter))
        group, means = "image" if image else "text", problem["choices"][problem["answer"]]
        path = image and f"scienceqa/images/test/{image}"
        truth.append(entry(id, path, problem["question"], letter, group, means=means))
    splits = {"train": [*train], "val": [], "test": test, "trainval": [*train]}
    splits |= {"minitrain": [*train][:1], "minival": [], "minitest": test[:4]}
    write_json(folder / "scienceqa/pid_splits.json", splits, indent=2)
    write_json(folder / "scienceqa/problems.json", {**problems, **train}, indent=2)
    write_json(folder / "scienceqa/llava_test_CQM-A.json", samples, indent=2)
    return truth


def _text_problem(rng: random.Random, split: str) -> dict:
    while not (question := text_question(rng)).text.endswith(LETTER):
        pass
    words, *options, _ = question.text.split("\n")
    return _problem(words, [option[3:] for option in options], LETTERS.index(question.answer), "", None, split)


def _problem(words: str, choices: list[str], answer: int, hint: str, image: str | None, split: str = "test") -> dict:
    return {
        "question": words,
        "choices": choices,
        "answer": answer,
        "hint": hint,
        "image": image,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science" if image else "language science",
        "topic": "toy world",
        "category": "Toy world",
        "skill": "Look at a picture" if image else "Know words",
        "lecture": "",
        "solution": "",
        "split": split,
    }


def _sqa_sample(id: str, image: str | None, problem: dict, letter: str) -> dict:
    context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
    text = f"{context}{problem['question']}\n{_listed(problem['choices'])}"
    human = {"from": "human", "value": f"<image>\n{text}" if image else text}
    sample = {"id": id, **({"image": image} if image else {})}
    return {**sample, "conversations": [human, {"from": "gpt", "value": letter}]}
