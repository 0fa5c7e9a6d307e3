"""The toy world's language: questions that need no picture, and all that is ever said, as text to train on."""

import random
from collections.abc import Iterable, Iterator

from vica.data.conversation import get_template
from vica.toy.captions import INSTRUCTIONS, caption
from vica.toy.forms import vary
from vica.toy.questions import LETTER, SHORT, Question, ask
from vica.toy.world import COLOURS, SHAPES, WORDS, random_scene

TURNS = 8  # of a conversation
PLAIN = 4  # one scene of so many is told in sentences by themselves


def text_question(rng: random.Random) -> Question:
    return rng.choice((_spelling, _sum, _larger, _sort, _choice))(rng)


def language(scenes: int, seed: int = 0) -> Iterator[str]:
    """What is said of so many train scenes: plain sentences, each a text, or a conversation about a caption, which is
    to the caption what a trained model's conversations are to pictures."""
    rng, template = random.Random(seed), get_template("vicuna_v1")
    for number in range(scenes):
        scene = random_scene(rng)
        told, asked = caption(scene, rng), [*ask(scene, rng, vary), text_question(rng)]
        if number % PLAIN == 1:
            yield f"{rng.choice(INSTRUCTIONS)} {told}"
            yield from (f"{question.text} {question.answer}" for question in asked)
        else:
            some = rng.sample(asked, min(TURNS, len(asked)))
            turns = [(role, text) for q in some for role, text in (("user", q.text), ("assistant", q.answer))]
            turns[0] = ("user", f"{told}\n{turns[0][1]}")
            yield template.render(turns).removesuffix(template.stop)


def _spelling(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    question, answer = rng.choice(
        (
            (f"How many letters has the word {word}?", str(len(word))),
            (f"What is the first letter of the word {word}?", word[0]),
            (f"What is the last letter of the word {word}?", word[-1]),
        )
    )
    return _short(question, answer)


def _sum(rng: random.Random) -> Question:
    a, b = rng.randint(1, 4), rng.randint(1, 4)
    return _short(f"What is {a} plus {b}?", str(a + b))


def _larger(rng: random.Random) -> Question:
    a, b = rng.sample(range(1, 10), 2)
    return _short(f"Which is larger, {a} or {b}?", str(max(a, b)))


def _sort(rng: random.Random) -> Question:
    sorts: tuple[tuple[Iterable[str], str], ...] = ((COLOURS, "colour"), (SHAPES, "shape"), (WORDS, "word"))
    names, answer = rng.choice(sorts)
    return _short(f"Is {rng.choice(list(names))} a colour, a shape or a word?", answer)


def _choice(rng: random.Random) -> Question:
    sorts: dict[str, Iterable[str]]
    sorts = {"colour": COLOURS, "shape": SHAPES, "word": WORDS, "number": "123456789"}
    order = rng.sample(list(sorts), 4)
    options = "\n".join(f"{letter}. {rng.choice(list(sorts[sort]))}" for letter, sort in zip("ABCD", order))
    asked = rng.randrange(4)
    return Question("text", f"Which of these is a {order[asked]}?\n{options}\n{LETTER}", "ABCD"[asked])


def _short(question: str, answer: str) -> Question:
    return Question("text", f"{question}\n{SHORT}", answer)
