"""The toy world: up to four coloured shapes on a plain ground, and sometimes a printed word.

A picture is 112 x 112 pixels, three rows of three places; a word takes a row of its own. No two things of a scene share
both shape and colour, so that "the red circle" names one thing.

Train and test differ in combinations. A fifth of all pairs of things are kept for the test: no train scene holds such a
pair, and every test scene does. So no scene can be in both splits, for any seeds; and since train scenes hold each
thing of a pair with other things, no single thing tells which split it belongs to.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np
from PIL import Image

from ..utils.errors import ViCAError
from . import letters

SIDE, PLACE = 112, 37  # pixels of a picture's side, and from one place to the next
MARGIN = 6  # pixels that a word leaves free, left and right together
SIZES = {"small": 20, "large": 32}
COLOURS = {
    "red": (220, 20, 30),
    "orange": (255, 135, 0),
    "yellow": (250, 225, 0),
    "green": (0, 150, 50),
    "blue": (30, 80, 240),
    "purple": (140, 30, 170),
    "pink": (255, 130, 200),
}
GROUNDS = {"white": (255, 255, 255), "grey": (165, 165, 165), "black": (0, 0, 0), "brown": (95, 60, 35)}
WORDS = tuple(
    "SUN CAT DOG BUS CUP HAT KEY MAP FISH BIRD TREE MOON LAMP DOOR CAKE MILK "
    "HOUSE TRAIN APPLE WATER HORSE CHAIR BREAD GRASS".split()
)
PLACES = (
    ("top left", "top centre", "top right"),
    ("centre left", "centre", "centre right"),
    ("bottom left", "bottom centre", "bottom right"),
)
SPLITS = ("train", "test")


def _star(x, y):
    """Returns whether points are inside at least four of the five lines that join a pentagram's tips."""
    turns = 2 * np.pi * np.arange(5) / 5
    return sum(x * np.sin(turn) - y * np.cos(turn) <= np.cos(2 * np.pi / 5) for turn in turns) >= 4


# Whether a point belongs to the shape; x to the right and y down, both from -1 to 1.
SHAPES = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.85,
    "triangle": lambda x, y: (2 * abs(x) <= y + 0.95) & (y <= 0.85),
    "star": _star,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.95),
    "ring": lambda x, y: (0.55**2 <= x**2 + y**2) & (x**2 + y**2 <= 1),
    "heart": lambda x, y: (1.4 * x**2 + (1.2 * y - 0.1) ** 2 - 1) ** 3 <= -1.6 * x**2 * (1.2 * y - 0.1) ** 3,
}


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    row: int
    column: int
    shift: tuple[int, int]  # pixels right and down from the middle of its place

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class Word:
    text: str
    row: int
    shift: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # in reading order
    ground: str
    word: Word | None


def random_scene(rng: random.Random, split: str = "train") -> Scene:
    """Returns a random scene. Half of the scenes have a group of two, three or four things of one shape or one
    colour."""
    if split not in SPLITS:
        raise ViCAError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    ground, group = rng.choice(tuple(GROUNDS)), rng.choice((1, 1, 1, 2, 3, 4))
    fewest = {"train": group, "test": max(group, 2)}[split]
    names = _random_names(rng, group, rng.randint(fewest, 4), split)
    word = _random_word(rng) if rng.random() < 0.5 else None
    places = [(row, column) for row in range(3) for column in range(3) if word is None or row != word.row]
    things = []
    for (row, column), (shape, colour) in zip(rng.sample(places, len(names)), names):
        thing = Thing(shape, colour, rng.choice(tuple(SIZES)), row, column, (0, 0))
        things.append(place_thing(thing, rng))
    things.sort(key=lambda thing: (thing.row, thing.column))
    return Scene(tuple(things), ground, word)


def place_thing(thing: Thing, rng: random.Random) -> Thing:
    """Returns the thing moved at random within its place."""
    room = PLACE - SIZES[thing.size]
    return replace(thing, shift=_random_shift(rng, room, room))


def is_train_scene(scene: Scene) -> bool:
    """Returns whether the train split could hold the scene: no pair of the test, nothing twice, nothing on top of
    another."""
    names = {(thing.shape, thing.colour) for thing in scene.things}
    places = {(thing.row, thing.column) for thing in scene.things}
    free = scene.word is None or all(row != scene.word.row for row, _ in places)
    return free and len(names) == len(places) == len(scene.things) and not hold_test_pair(names)


def hold_test_pair(names: Iterable[tuple[str, str]]) -> bool:
    """Returns whether two of the things, each given by shape and colour, are a pair that is kept for the test."""
    numbers = [len(COLOURS) * list(SHAPES).index(shape) + list(COLOURS).index(colour) for shape, colour in names]
    return any((one + other) % 5 == 0 for one, other in combinations(numbers, 2))


def _random_names(rng: random.Random, group: int, count: int, split: str) -> list[tuple[str, str]]:
    """Returns shapes with colours. The group shares one shape or one colour; otherwise nothing occurs twice."""
    while True:
        shapes, colours = rng.sample(tuple(SHAPES), count), rng.sample(tuple(COLOURS), count)
        common = rng.choice((shapes, colours))
        common[:group] = [common[0]] * group
        names = list(zip(shapes, colours))
        if hold_test_pair(names) == (split == "test"):
            return names


def _random_word(rng: random.Random) -> Word:
    text = rng.choice(WORDS)
    shift = _random_shift(rng, SIDE - MARGIN - _width(text), PLACE - letters.HEIGHT)
    return Word(text, rng.randrange(3), shift)


def _random_shift(rng: random.Random, across: int, down: int) -> tuple[int, int]:
    """Returns a shift within the free room in pixels."""
    return rng.randint(-(across // 2), across // 2), rng.randint(-(down // 2), down // 2)


def _width(text: str) -> int:
    return letters.PITCH * len(text) - (letters.PITCH - letters.WIDTH)


def draw(scene: Scene) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), GROUNDS[scene.ground])
    for thing in scene.things:
        half = SIZES[thing.size] // 2
        x, y = _middle(thing.column) + thing.shift[0], _middle(thing.row) + thing.shift[1]
        picture.paste(COLOURS[thing.colour], (x - half, y - half), _shape_mask(thing.shape, 2 * half))
    if scene.word:
        ink = GROUNDS["black" if scene.ground in ("white", "grey") else "white"]
        x = (SIDE - _width(scene.word.text)) // 2 + scene.word.shift[0]
        y = _middle(scene.word.row) - letters.HEIGHT // 2 + scene.word.shift[1]
        for place, letter in enumerate(scene.word.text):
            picture.paste(ink, (x + place * letters.PITCH, y), _letter_mask(letter))
    return picture


def _middle(place: int) -> int:
    """Returns the middle of a row or a column, in pixels."""
    return SIDE // 2 + PLACE * (place - 1)


@cache
def _shape_mask(shape: str, size: int, fine: int = 4) -> Image.Image:
    y, x = (np.indices((size * fine, size * fine)) + 0.5) * 2 / (size * fine) - 1
    return Image.fromarray(letters.shrink(SHAPES[shape](x, y), fine))


@cache
def _letter_mask(letter: str) -> Image.Image:
    return Image.fromarray(letters.cover(letter))
