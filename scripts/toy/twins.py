"""Makes scenes that differ in one thing only, which a contrastive tower must tell apart to learn more than colours.

Among random pictures, colours, places and grounds identify each one, and a tower never learns shapes or letters. Twins
of a picture in its batch force it to. If two things have exchanged shapes or colours, it must also learn which belongs
to which.
"""

import random
from dataclasses import replace

from vica.toy.world import COLOURS, SHAPES, WORDS, Scene, is_train_scene, place_thing


def twins(scene: Scene, count: int, rng: random.Random) -> list[Scene]:
    """Returns the scene and `count` others of the train split, each with one shape, colour, size, place or the word
    changed, or with two things' shapes or colours exchanged."""
    changes = [_shape, _shape, _colour, _size, _place]  # shapes are the hardest to see
    changes += [_word] if scene.word else []
    changes += [_exchange] if len(scene.things) > 1 else []
    family = {_unmoved(scene): scene}
    while len(family) <= count:
        other = rng.choice(changes)(scene, rng)
        if _unmoved(other) not in family and is_train_scene(other):
            family[_unmoved(other)] = other
    return list(family.values())


def _unmoved(scene: Scene) -> Scene:
    """Returns the scene without shifts. Scenes that differ only in some pixels have the same captions, and no loss
    could tell them apart."""
    return replace(scene, things=tuple(replace(thing, shift=(0, 0)) for thing in scene.things))


def _shape(scene: Scene, rng: random.Random) -> Scene:
    return _with_one(scene, rng, lambda thing: replace(thing, shape=rng.choice(tuple(SHAPES))))


def _colour(scene: Scene, rng: random.Random) -> Scene:
    return _with_one(scene, rng, lambda thing: replace(thing, colour=rng.choice(tuple(COLOURS))))


def _size(scene: Scene, rng: random.Random) -> Scene:
    other = {"small": "large", "large": "small"}
    return _with_one(scene, rng, lambda thing: place_thing(replace(thing, size=other[thing.size]), rng))


def _place(scene: Scene, rng: random.Random) -> Scene:
    return _with_one(scene, rng, lambda thing: replace(thing, row=rng.randrange(3), column=rng.randrange(3)))


def _word(scene: Scene, rng: random.Random) -> Scene:
    """Returns the scene with another word of the same length, which covers the same pixels."""
    assert scene.word is not None
    alike = [word for word in WORDS if len(word) == len(scene.word.text)]
    return replace(scene, word=replace(scene.word, text=rng.choice(alike)))


def _exchange(scene: Scene, rng: random.Random) -> Scene:
    field, things = rng.choice(("shape", "colour")), list(scene.things)
    one, other = rng.sample(range(len(things)), 2)
    pair = things[one], things[other]
    things[one], things[other] = (
        replace(thing, **{field: getattr(twin, field)}) for thing, twin in zip(pair, reversed(pair))
    )
    return replace(scene, things=tuple(things))


def _with_one(scene: Scene, rng: random.Random, change) -> Scene:
    things = list(scene.things)
    place = rng.randrange(len(things))
    things[place] = change(things[place])
    return replace(scene, things=tuple(sorted(things, key=lambda thing: (thing.row, thing.column))))
