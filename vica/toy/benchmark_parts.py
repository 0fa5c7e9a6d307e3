"""Common parts of the toy world's benchmarks: scenes that allow a question, and images and lists in files."""

import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .questions import FACTS, Fact
from .world import Scene, draw, random_scene


def cases(part: str, count: int, seed: int, make: Callable[[Scene, random.Random], Any]) -> Iterator[tuple]:
    """Yields scenes of the test split, each with the questions that `make` finds and its random generator. Each depends
    only on the seed and its own number, so a larger set begins with the smaller one."""
    for index in range(count):
        # seeded by a string, which gives the same in every process
        rng = random.Random(f"{seed} benchmark {part} {index}")
        while not (made := make(scene := random_scene(rng, "test"), rng)):
            pass
        yield index, scene, made, rng


def facts(scene: Scene, rng: random.Random) -> dict[str, Fact]:
    return {fact.kind: fact for make in FACTS if (fact := make(scene, rng))}


def save_picture(scene: Scene, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(scene, "PNG" if path.suffix == ".png" else "JPEG"))


def encoded(scene: Scene, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    options = dict(quality=98, subsampling=0) if kind == "JPEG" else {}  # the usual halved chroma bleeds at the edges
    draw(scene).save(file, kind, **options)
    return file.getvalue()


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")


def write_lines(path: Path, records: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def line(id: int | str, image: str, text: str, category: str = "default") -> dict:
    """Returns a question in the form of LLaVA's files of JSON lines."""
    return {"question_id": id, "image": image, "text": text, "category": category}


def entry(id: int | str, image: str | None, question: str, answer: str, group: str, **more: Any) -> dict:
    """Returns a question in the form of `truth.json`."""
    return {"id": id, "image": image, "question": question, "answer": answer, "group": group, **more}


def one_fact(scene: Scene, rng: random.Random) -> Fact:
    return rng.choice([*facts(scene, rng).values()])


def some_options(fact: Fact, count: int, rng: random.Random) -> list[str]:
    """Returns `count` options, the right one among them, in random order."""
    options = [fact.answer, *fact.wrong[: count - 1]]
    rng.shuffle(options)
    return options
