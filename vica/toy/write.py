"""Writes a toy world as data in LLaVA's format: pictures, both training stages, and questions for evaluation.

    images/train/000000.png ...   one picture for each sample of either stage, beside images/test/000000.png ...
    pretrain.json                 first stage: an instruction and a caption
    finetune.json                 second stage: several questions a picture, in all forms; one in sixteen without one
    test.jsonl                    a question a line, of every kind that the picture allows, with its answer

Each sample depends only on the seed and its own number, so a larger world begins with the smaller one.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from ..utils.errors import ViCAError
from ..utils.files import whole_folder
from ..utils.program import exit_status
from .captions import INSTRUCTIONS, caption
from .cores import in_order
from .forms import vary
from .questions import Question, questions_about
from .text_questions import text_question
from .world import Scene, draw, random_scene

FOLDER = Path("playground/toy/world")
TURNS = 6  # questions about one training picture
PICTURES_A_TEXT = 15  # samples with a picture for each one without


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vica.toy.write",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"must be empty or new (default: {FOLDER})")
    parser.add_argument("--train", type=int, default=160000, metavar="N", help="pictures to train on (default: 160000)")
    parser.add_argument("--test", type=int, default=500, metavar="M", help="pictures to ask about (default: 500)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    return exit_status("vica.toy.write", lambda: run(parser.parse_args(argv)))


def run(args) -> None:
    write(args.folder, args.train, args.test, args.seed, progress=True)
    print(f"{args.folder}: {args.train} pictures to train on, {args.test} to ask about")


def write(folder: Path, train: int, test: int, seed: int = 0, progress: bool = False) -> Path:
    """Writes the world and returns its folder, which appears whole or not at all."""
    folder = Path(folder)
    for name, count in (("train", train), ("test", test)):
        if count < 1:
            raise ViCAError(f"{name} is {count}; it must be 1 at least")
    with whole_folder(folder) as partial:
        for split, count in (("train", train), ("test", test)):
            _draw_all(partial / "images" / split, split, count, seed, progress)
        _write_list(partial / "pretrain.json", pretrain_samples(train, seed))
        _write_list(partial / "finetune.json", finetune_samples(train, seed))
        (partial / "test.jsonl").write_text("".join(f"{json.dumps(q)}\n" for q in test_questions(test, seed)))
    return folder


def scene_at(split: str, index: int, seed: int) -> Scene:
    return random_scene(_random(seed, split, index, "scene"), split)


def pretrain_samples(count: int, seed: int) -> Iterator[dict]:
    for index in range(count):
        rng = _random(seed, "train", index, "caption")
        yield {
            "id": f"train-{index:06}",
            "image": _image("train", index),
            "conversations": _turns(
                f"<image>\n{rng.choice(INSTRUCTIONS)}", caption(scene_at("train", index, seed), rng)
            ),
        }


def finetune_samples(count: int, seed: int) -> Iterator[dict]:
    for index in range(count):
        (first, answer), *others = ((q.text, q.answer) for q in _questions("train", index, seed)[:TURNS])
        turns = _turns(f"<image>\n{first}", answer)
        for other in others:
            turns += _turns(*other)
        yield {"id": f"train-{index:06}", "image": _image("train", index), "conversations": turns}
        if index % PICTURES_A_TEXT == PICTURES_A_TEXT - 1:
            question = text_question(_random(seed, "train", index, "text"))
            yield {"id": f"text-{index:06}", "conversations": _turns(question.text, question.answer)}


def test_questions(count: int, seed: int) -> Iterator[dict]:
    asked = ((index, question) for index in range(count) for question in _questions("test", index, seed))
    for number, (index, question) in enumerate(asked):
        yield {
            "question_id": number,
            "image": _image("test", index),
            "text": question.text,
            "answer": question.answer,
            "kind": question.kind,
        }


def _questions(split: str, index: int, seed: int) -> list[Question]:
    form = vary if split == "train" else None
    return questions_about(scene_at(split, index, seed), _random(seed, split, index, "questions"), form)


def _turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _image(split: str, index: int) -> str:
    return f"{split}/{index:06}.png"


def _random(seed: int, split: str, index: int, part: str) -> random.Random:
    return random.Random(f"{seed} {split} {index} {part}")  # seeded by a string, which gives the same in every process


def _draw_all(folder: Path, split: str, count: int, seed: int, progress: bool) -> None:
    folder.mkdir(parents=True)
    for _ in in_order(partial(_draw_one, folder, split, seed), count, f"drawing {split}", "pictures", progress):
        pass


def _draw_one(folder: Path, split: str, seed: int, index: int) -> None:
    draw(scene_at(split, index, seed)).save(folder / f"{index:06}.png")


def _write_list(path: Path, samples: Iterable[dict]) -> None:
    """Writes a JSON list, one sample a line."""
    with open(path, "w") as file:
        for place, sample in enumerate(samples):
            file.write(f"{',' if place else '['}\n{json.dumps(sample)}")
        file.write("\n]\n")


if __name__ == "__main__":
    sys.exit(main())
