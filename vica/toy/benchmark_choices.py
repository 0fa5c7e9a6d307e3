"""Writes toy benchmarks answered by an option's letter: SEED-Bench and ScienceQA, in their authors' file formats."""

import random
from pathlib import Path

from .benchmark_parts import (
    cases,
    entry,
    facts,
    line,
    one_fact,
    save_picture,
    some_options,
    write_json,
    write_lines,
)
from .forms import LETTERS, hint, listed
from .questions import OPTION_LETTER, Fact
from .text_questions import text_question
from .world import Scene

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


def _two_facts(scene: Scene, rng: random.Random) -> list[Fact]:
    return rng.sample([*facts(scene, rng).values()], 2)


def write_seed(folder: Path, pictures: int, seed: int) -> list[dict]:
    records, lines, truth = [], [], []
    for index, scene, asked, rng in cases("seed", pictures, seed, _two_facts):
        name = f"{1454426 + 7 * index}_{rng.getrandbits(32)}"  # a JPEG without suffix, as everywhere in SEED-Bench
        save_picture(scene, folder / "seed_bench/SEED-Bench-image" / name)
        for place, fact in enumerate(asked):
            id, options, kind = 101669 + 10 * index + place, some_options(fact, 4, rng), SEED_KINDS[fact.kind]
            letter, image = LETTERS[options.index(fact.answer)], f"SEED-Bench-image/{name}"
            records.append(_seed_record(str(id), name, kind, fact.english, options, letter, "image"))
            # a number in this file only
            lines.append(line(id, image, f"{fact.english}\n{listed(options)}\n{OPTION_LETTER}", kind))
            truth.append(entry(id, f"seed_bench/{image}", fact.english, letter, kind, means=fact.answer))
    videos = _seed_videos(max(3, pictures // 4))
    for video in videos:
        options = [video[f"choice_{letter.lower()}"] for letter in LETTERS]
        image = f"SEED-Bench-video-image/{video['question_type_id']}_{video['question_id']}.png"
        kind = next(name for name, id in SEED_TYPES.items() if id == video["question_type_id"])
        text = f"{video['question']}\n{listed(options)}\n{OPTION_LETTER}"
        lines.append(line(video["question_id"], image, text, kind))
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
    """Returns video records as in the real file, but without any frame: an evaluation on images leaves them out."""
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
    """Writes ScienceQA, with one text-only problem for every three with a picture. The train split, which no evaluation
    uses, has text-only problems alone."""
    problems, samples, truth = {}, [], []
    for index, scene, fact, rng in cases("sqa", pictures, seed, one_fact):
        options = some_options(fact, rng.choice((2, 3, 4)), rng)
        context = hint(fact, scene) if rng.random() < 0.4 else ""
        id = str(4 + 5 * index)
        problems[id] = _problem(fact.english, options, options.index(fact.answer), context, "image.png")
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
    while not (question := text_question(rng)).text.endswith(OPTION_LETTER):
        pass
    words, *options, _ = question.text.split("\n")
    return _problem(words, [option[3:] for option in options], LETTERS.index(question.answer), "", None, split)


def _problem(words: str, choices: list[str], answer: int, context: str, image: str | None, split: str = "test") -> dict:
    return {
        "question": words,
        "choices": choices,
        "answer": answer,
        "hint": context,
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
    text = f"{context}{problem['question']}\n{listed(problem['choices'])}"
    human = {"from": "human", "value": f"<image>\n{text}" if image else text}
    sample = {"id": id, **({"image": image} if image else {})}
    return {**sample, "conversations": [human, {"from": "gpt", "value": letter}]}
