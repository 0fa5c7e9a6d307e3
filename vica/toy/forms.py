"""Rewrites questions in the other forms of LLaVA's training mix and of the benchmarks: with an OCR system's tokens,
with a hint, with fewer options, or without the sentence on how to answer."""

import random
from dataclasses import replace

from .questions import CHINESE, Fact, Question
from .world import Scene

LETTERS = "ABCD"
OCR = "Reference OCR token: "


def vary(question: Question, fact: Fact | None, scene: Scene, rng: random.Random) -> Question:
    """Returns the question in a random form. `fact` is the fact that it asks, if it asks one."""
    if question.kind in ("choice", "choice_chinese"):
        assert fact is not None  # each choice is about one
        return _vary_choice(question, fact, scene, rng)
    words, how = question.text.split("\n")
    lines = [words]
    if fact and fact.kind == "word" and rng.random() < 0.5:
        lines.append(ocr_line(read_tokens(fact, rng)))
    if rng.random() < 0.7:
        lines.append(how)
    return replace(question, text="\n".join(lines))


def _vary_choice(question: Question, fact: Fact, scene: Scene, rng: random.Random) -> Question:
    words, *options, how = question.text.split("\n")
    options = [option[3:] for option in options]
    right = options[LETTERS.index(question.answer)]
    wrong = rng.sample([option for option in options if option != right], rng.choice((1, 2, 3, 3)))
    options = [option for option in options if option == right or option in wrong]
    chinese = question.kind == "choice_chinese"
    told = hint(fact, scene, chinese) if rng.random() < 0.3 else ""
    if told:  # ScienceQA marks it as context, MMBench does not
        words = f"{told}\n{words}" if chinese or rng.random() < 0.5 else f"Context: {told}\n{words}"
    return replace(question, text=f"{words}\n{listed(options)}\n{how}", answer=LETTERS[options.index(right)])


def read_tokens(fact: Fact, rng: random.Random) -> list[str]:
    """Returns the text that an OCR program might find: the word, a part of it, or nothing."""
    return rng.choice(([fact.answer], [fact.answer], [fact.answer[:-1], fact.answer[-1]], []))


def ocr_line(tokens: list[str]) -> str:
    return OCR + ", ".join(tokens)


def listed(options: list[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))


def hint(fact: Fact, scene: Scene, chinese: bool = False) -> str:
    """Returns facts that the question does not ask, one a line."""
    lines = []
    if fact.kind != "ground":
        lines.append(f"图片的背景是{CHINESE[scene.ground]}。" if chinese else f"The background is {scene.ground}.")
    if fact.kind != "word" and scene.word:
        word = scene.word.text
        lines.append(f"图中写的是{word}。" if chinese else f"The word {word} is written in the image.")
    return "\n".join(lines)
