"""Questions of the toy world that need no picture."""

import random
from collections.abc import Iterable

from .questions import OPTION_LETTER, SHORT_ANSWER, Question
from .world import COLOURS, SHAPES, WORDS


def text_question(rng: random.Random) -> Question:
    return rng.choice((_spelling, _sum, _larger, _sort, _choice))(rng)


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
    return Question("text", f"Which of these is a {order[asked]}?\n{options}\n{OPTION_LETTER}", "ABCD"[asked])


def _short(question: str, answer: str) -> Question:
    return Question("text", f"{question}\n{SHORT_ANSWER}", answer)
