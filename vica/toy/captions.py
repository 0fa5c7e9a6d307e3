"""Captions scenes for the first training stage: all things with size, colour, shape and place, and the word."""

import random

from .world import Scene

INSTRUCTIONS = ("Describe the image.", "What is in the image?", "Write a caption of the image.")
PHRASES = (
    "{things} on a {ground} background.",
    "{number} on a {ground} background: {things}.",
    "The background is {ground}, with {things}.",
    "An image of {things} on a {ground} background.",
)
WORD_PHRASES = ("The word {word} is written at the {row}.", "At the {row} it says {word}.")
ROWS = ("top", "centre", "bottom")


def caption(scene: Scene, rng: random.Random) -> str:
    things = [f"a {thing.size} {thing.name} at the {thing.place}" for thing in scene.things]
    number = f"{len(things)} object{'s' if len(things) > 1 else ''}"
    text = rng.choice(PHRASES).format(things=_listed(things), ground=scene.ground, number=number)
    if scene.word:
        text += " " + rng.choice(WORD_PHRASES).format(word=scene.word.text, row=ROWS[scene.word.row])
    return text[0].upper() + text[1:]


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
