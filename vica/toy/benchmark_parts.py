"""Shared parts of the toy benchmarks: scenes that allow a question, images and lists in files."""

import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .questions import FACTS, Fact
from .world import Scene, draw, random_scene


def cases(part: str, count: int, seed: int, make: Callable[[Scene, random.Random], Any]) -> Iterator[tuple]:
    """Scenes of the test split with what `make` finds to ask, and the source of further chance. Each comes of the seed
    and its own number alone, so that more pictures begin with the fewer."""
    for index in range(count):
        rng = random.Random(f"{seed} benchmark {part} {index}")  # of a string: the same in every process
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
    options = dict(quality=98, subsampling=0) if kind == "JPEG" else {}  # the usual half chroma bleeds at the edges
    draw(scene).save(file, kind, **options)
    return file.getvalue()


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")


def write_lines(path: Path, records: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def line(id: int | str, image: str, text: str, category: str = "default") -> dict:
    """A question as LLaVA's files of JSON lines have it."""
    return {"question_id": id, "image": image, "text": text, "category": category}


def entry(id: int | str, image: str | None, question: str, answer: str, group: str, **more: Any) -> dict:
    """A question as `truth.json` has it."""
    return {"id": id, "image": image, "question": question, "answer": answer, "group": group, **more}


def one_fact(scene: Scene, rng: random.Random) -> Fact:
    return rng.choice([*facts(scene, rng).values()])


def some_options(fact: Fact, count: int, rng: random.Random) -> list[str]:
    """The right one among so many, in any order."""
    options = [fact.answer, *fact.wrong[: count - 1]]
    rng.shuffle(options)
    return options
