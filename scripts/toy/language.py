"""The toy world's language as text to train on: all that is said about its pictures, and questions without one."""

import random
from collections.abc import Iterator

from vica.data.conversation import get_template
from vica.toy.captions import INSTRUCTIONS, caption
from vica.toy.forms import vary
from vica.toy.questions import questions_about
from vica.toy.text_questions import text_question
from vica.toy.world import random_scene

TURNS = 8  # of a conversation
PLAIN = 4  # one scene in so many is told in separate sentences


def language(scenes: int, seed: int = 0) -> Iterator[str]:
    """Yields the texts about `scenes` train scenes: separate sentences, or a conversation about a caption, which stands
    in for the picture of a trained model's conversations."""
    rng, template = random.Random(seed), get_template("vicuna_v1")
    for number in range(scenes):
        scene = random_scene(rng)
        told, asked = caption(scene, rng), [*questions_about(scene, rng, vary), text_question(rng)]
        if number % PLAIN == 1:
            yield f"{rng.choice(INSTRUCTIONS)} {told}"
            yield from (f"{question.text} {question.answer}" for question in asked)
        else:
            some = rng.sample(asked, min(TURNS, len(asked)))
            turns = [(role, text) for q in some for role, text in (("user", q.text), ("assistant", q.answer))]
            turns[0] = ("user", f"{told}\n{turns[0][1]}")
            yield template.render(turns).removesuffix(template.stop)
