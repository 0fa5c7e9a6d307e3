"""Finds the option that an answer means, if it is not just a letter, by the rules of MMBench's public toolkit without a
language model as a judge ("exact matching")."""

import re

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def chosen(answer: str, options: dict[str, str]) -> str | None:
    """Returns the letter of the option that an answer means; None, or a Z, for no option."""
    return _by_letter(answer, options) or _by_text(answer, options)


def _by_letter(answer: str, options: dict[str, str]) -> str | None:
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:  # earlier in the text an A is an article
        return named[0]
    if not named and "Z" in words:
        return "Z"
    said = re.search(r"(?i)answer\s+is\s+\**([ABCD])", answer)
    return said[1].upper() if said and said[1].upper() in options else None


def _by_text(answer: str, options: dict[str, str]) -> str | None:
    if len(answer.lower()) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None
