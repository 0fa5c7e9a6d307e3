"""Makes questions about a scene, each of a kind that LLaVA's benchmarks use, with its exact answer.

    existence                   POPE, MME    yes or no
    claim                       MME          yes or no, about anything that the open questions ask
    relation, comparison        GQA          yes or no; one of two things
    neighbour                   GQA          a colour, found by way of another thing
    colour, shape, ground       VQAv2        one or two words
    count, place                SEED, VQAv2  1 to 4; one of nine places
    word                        TextVQA      the printed word
    choice, choice_chinese      MMBench, SEED, ScienceQA    a letter

Without the picture an answer is only a guess: the answer is chosen before the question, so that in each kind all
answers are equally frequent. A name fits one thing only, and no relation between two things depends on a few pixels.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations, product

from .world import COLOURS, GROUNDS, PLACES, SHAPES, WORDS, Scene, Thing

# LLaVA's sentences, which its checkpoints were trained to follow.
SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
OPTION_LETTER_CHINESE = "请直接回答选项字母。"

COUNTS = ("1", "2", "3", "4")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
CHINESE = {
    **dict(zip(SHAPES, "圆形 正方形 三角形 星形 十字形 圆环 心形".split())),
    **dict(zip(COLOURS, "红色 橙色 黄色 绿色 蓝色 紫色 粉色".split())),
    **dict(zip(GROUNDS, "白色 灰色 黑色 棕色".split())),
    **dict(zip(sum(PLACES, ()), "左上 中上 右上 左中 中间 右中 左下 中下 右下".split())),
    **dict(zip(OPPOSITES, "左边 右边 上面 下面".split())),
}


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Fact:
    """A fact that an open question asks, and a claim about it to fill with a right or a wrong answer."""

    kind: str
    english: str
    chinese: str
    claim: str
    answer: str
    wrong: tuple[str, ...]  # at least three, shuffled


def questions_about(scene: Scene, rng: random.Random, form: Callable | None = None) -> list[Question]:
    """Returns a question of each kind that the scene allows, in random order. `form` may rewrite each: it takes the
    question, the fact that it asks or None, the scene and `rng`."""
    facts = [fact for make in FACTS if (fact := make(scene, rng))]
    asked: list[tuple[Question, Fact | None]]
    asked = [(Question(fact.kind, f"{fact.english}\n{SHORT_ANSWER}", fact.answer), fact) for fact in facts]
    for make in (_claim, _choice, _chinese):
        fact = rng.choice(facts)
        asked.append((make(fact, rng), fact))
    asked += [(question, None) for make in (_existence, _relation, _comparison) if (question := make(scene, rng))]
    rng.shuffle(asked)
    return [form(question, fact, scene, rng) if form else question for question, fact in asked]


def _colour(scene: Scene, rng: random.Random) -> Fact | None:
    if not (things := [thing for thing in scene.things if _frequency(scene)[thing.shape] == 1]):
        return None
    thing = rng.choice(things)
    return Fact(
        "colour",
        f"What colour is the {thing.shape}?",
        f"图中的{CHINESE[thing.shape]}是什么颜色？",
        f"Is the {thing.shape} {{}}?",
        thing.colour,
        _wrong(COLOURS, thing.colour, rng),
    )


def _shape(scene: Scene, rng: random.Random) -> Fact | None:
    if not (things := [thing for thing in scene.things if _frequency(scene)[thing.colour] == 1]):
        return None
    thing = rng.choice(things)
    return Fact(
        "shape",
        f"What shape is the {thing.colour} object?",
        f"图中{CHINESE[thing.colour]}的物体是什么形状？",
        f"Is the {thing.colour} object a {{}}?",
        thing.shape,
        _wrong(SHAPES, thing.shape, rng),
    )


def _count(scene: Scene, rng: random.Random) -> Fact | None:
    """Returns a question on a group's size, if there is a group, which has two to four things with equal chance. A
    single thing is as frequent an answer."""
    frequency = _frequency(scene)
    if (most := max(frequency.values())) == 1:
        return None
    answer = rng.choice((1, most, most, most))
    name = rng.choice([name for name, times in frequency.items() if times == answer])
    plural = f"{name} objects" if name in COLOURS else "crosses" if name == "cross" else f"{name}s"
    return Fact(
        "count",
        f"How many {plural} are there?",
        f"图中有几个{CHINESE[name]}{'的物体' if name in COLOURS else ''}？",
        f"Is the number of {plural} {{}}?",
        str(answer),
        _wrong(COUNTS, str(answer), rng),
    )


def _place(scene: Scene, rng: random.Random) -> Fact:
    thing = rng.choice(scene.things)
    return Fact(
        "place",
        f"Where in the image is the {thing.name}?",
        f"{_chinese_name(thing)}在图中的什么位置？",
        f"Is the {thing.name} at the {{}} of the image?",
        thing.place,
        _wrong(sum(PLACES, ()), thing.place, rng),
    )


def _neighbour(scene: Scene, rng: random.Random) -> Fact | None:
    """Returns a question only if a single thing is on that side, and all others are on the opposite one."""
    found = [
        (thing, relation, other)
        for other in scene.things
        for relation in OPPOSITES
        if len(beside := [thing for thing in scene.things if stands(thing, relation, other)]) == 1
        and all(stands(t, OPPOSITES[relation], other) for t in scene.things if t not in (other, *beside))
        for thing in beside
    ]
    if not found:
        return None
    thing, relation, other = rng.choice(found)
    return Fact(
        "neighbour",
        f"What colour is the object {relation} the {other.name}?",
        f"{_chinese_name(other)}{CHINESE[relation]}的物体是什么颜色？",
        f"Is the object {relation} the {other.name} {{}}?",
        thing.colour,
        _wrong(COLOURS, thing.colour, rng),
    )


def _word(scene: Scene, rng: random.Random) -> Fact | None:
    return (
        None
        if scene.word is None
        else Fact(
            "word",
            "What word is written in the image?",
            "图中写的是什么单词？",
            "Is the word written in the image {}?",
            scene.word.text,
            _wrong(WORDS, scene.word.text, rng),
        )
    )


def _ground(scene: Scene, rng: random.Random) -> Fact:
    return Fact(
        "ground",
        "What colour is the background?",
        "图片的背景是什么颜色？",
        "Is the background {}?",
        scene.ground,
        _wrong(GROUNDS, scene.ground, rng),
    )


FACTS = (_colour, _shape, _count, _place, _neighbour, _word, _ground)


def _claim(fact: Fact, rng: random.Random) -> Question:
    answer = rng.choice(("yes", "no"))
    claimed = fact.answer if answer == "yes" else fact.wrong[0]
    return Question("claim", f"{fact.claim.format(claimed)}\n{SHORT_ANSWER}", answer)


def _choice(fact: Fact, rng: random.Random) -> Question:
    options, answer = _options(fact, rng)
    return Question("choice", f"{fact.english}\n{options}\n{OPTION_LETTER}", answer)


def _chinese(fact: Fact, rng: random.Random) -> Question:
    options, answer = _options(fact, rng, CHINESE)
    return Question("choice_chinese", f"{fact.chinese}\n{options}\n{OPTION_LETTER_CHINESE}", answer)


def _options(fact: Fact, rng: random.Random, translation: dict[str, str] | None = None) -> tuple[str, str]:
    """Returns four options, one a line, and the letter of the right one. Options without a translation stay as they
    are."""
    options, place = list(fact.wrong[:3]), rng.randrange(4)
    rng.shuffle(options)
    options.insert(place, fact.answer)
    return "\n".join(f"{letter}. {(translation or {}).get(o, o)}" for letter, o in zip("ABCD", options)), "ABCD"[place]


def _existence(scene: Scene, rng: random.Random) -> Question:
    """Asks for something present or absent. Half of the absent ones share shape or colour with something present."""
    answer, thing = rng.choice(("yes", "no")), rng.choice(scene.things)
    shape, colour = thing.shape, thing.colour
    if answer == "no":
        present = [(thing.shape, thing.colour) for thing in scene.things]
        absent = [pair for pair in product(SHAPES, COLOURS) if pair not in present]
        near = [pair for pair in absent if not _frequency(scene).keys().isdisjoint(pair)]
        shape, colour = rng.choice(near if near and rng.random() < 0.5 else absent)
    article = "an" if colour == "orange" else "a"
    return Question("existence", f"Is there {article} {colour} {shape} in the image?\n{SHORT_ANSWER}", answer)


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    found = [
        (thing, relation, other)
        for thing, other in permutations(scene.things, 2)
        for relation in OPPOSITES
        if stands(thing, relation, other)
    ]
    if not found:
        return None
    (thing, relation, other), answer = rng.choice(found), rng.choice(("yes", "no"))
    asked = relation if answer == "yes" else OPPOSITES[relation]
    return Question("relation", f"Is the {thing.name} {asked} the {other.name}?\n{SHORT_ANSWER}", answer)


def _comparison(scene: Scene, rng: random.Random) -> Question | None:
    if not (found := [(thing, other) for thing, other in permutations(scene.things, 2) if thing.size != other.size]):
        return None
    pair, (word, size) = rng.choice(found), rng.choice((("larger", "large"), ("smaller", "small")))
    answer = next(thing.name for thing in pair if thing.size == size)
    text = f"Which is {word}, the {pair[0].name} or the {pair[1].name}?"
    return Question("comparison", f"{text}\n{SHORT_ANSWER}", answer)


def stands(thing: Thing, relation: str, other: Thing) -> bool:
    return {
        "left of": thing.column < other.column,
        "right of": thing.column > other.column,
        "above": thing.row < other.row,
        "below": thing.row > other.row,
    }[relation]


def _frequency(scene: Scene) -> Counter:
    """Counts the things of each shape and of each colour."""
    return Counter(name for thing in scene.things for name in (thing.shape, thing.colour))


def _chinese_name(thing: Thing) -> str:
    return f"{CHINESE[thing.colour]}的{CHINESE[thing.shape]}"


def _wrong(values: Iterable[str], answer: str, rng: random.Random) -> tuple[str, ...]:
    wrong = [value for value in values if value != answer]
    rng.shuffle(wrong)
    return tuple(wrong)
