"""Encodes a conversation as token ids and labels: the tokens to read, and those to learn.

Ids and labels are those of LLaVA-1.5's training, with three differences. A conversation from which LLaVA learns nothing
(a question without an answer, an empty question, a stop token inside a message) is an error here that says so. A
message that holds " ASSISTANT: ", which LLaVA also drops, is kept. And the token after an image is not learned: the
last visual token would have to predict it, and visual tokens have no hidden state here. Template plain has such a
token, the first of a caption.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from ..utils.errors import ViCAError
from .conversation import Template, get_template
from .messages import shorten
from .processor import ViCAProcessor
from .tokenizer import IMAGE_MARK

IGNORE = -100
_SPEAKERS = ("human", "gpt")
_ROLES = ("user", "assistant")
_SURROGATE = re.compile("[\ud800-\udfff]")


def encode(
    conversations: Sequence[Mapping],
    processor: ViCAProcessor,
    template: str,
    max_length: int | None = None,
    visual_tokens: int = 1,
) -> tuple[list[int], list[int]]:
    """Returns `input_ids`, with one placeholder an image, and `labels`: the answers and the token that ends each, else
    IGNORE.

    The text is cut at `max_length` positions, an image being `visual_tokens` of them; an image that does not fit whole
    is cut off.
    """
    turns = read_turns(conversations)
    build = _plain if get_template(template).name == "plain" else _chat
    ids, labels = build(turns, processor, get_template(template))
    image = processor.image_token_index
    labels = [IGNORE if before == image else label for before, label in zip([None, *ids], labels)]
    if max_length is not None:
        ends = accumulate(visual_tokens if token == image else 1 for token in ids)
        kept = bisect_right(list(ends), max_length)
        ids, labels = ids[:kept], labels[:kept]
    if all(label == IGNORE for label in labels):
        raise ViCAError(f"no answer begins within {max_length} positions")
    return ids, labels


def read_turns(conversations: Sequence[Mapping]) -> list[str]:
    """Returns the texts, question and answer in turn, with images in front of their messages. As in LLaVA an answer
    before the first question is left out."""
    if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
        raise ViCAError(f"conversations must be a list of turns, got {shorten(conversations)}")
    said = [_read_turn(place, turn) for place, turn in enumerate(conversations, 1)]
    if said[0][0] == "gpt":
        del said[0]
    for place, (speaker, text) in enumerate(said):
        if speaker != _SPEAKERS[place % 2]:
            raise ViCAError(f"{speaker} speaks twice in a row")
        if speaker == "gpt" and IMAGE_MARK in text:
            raise ViCAError(f"an answer holds {IMAGE_MARK}; only a question may: {shorten(text)}")
    turns = [_images_first(text) if speaker == "human" else text for speaker, text in said]
    if not all(turns[0::2]):
        raise ViCAError("a question is empty")
    if len(turns) % 2 or not turns or not turns[-1]:
        raise ViCAError("the conversation does not end with an answer")
    return turns


def _read_turn(place: int, turn: Mapping) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or turn.get("from") not in _SPEAKERS or not isinstance(turn.get("value"), str):
        raise ViCAError(f'turn {place} must be {{"from": "human" or "gpt", "value": text}}, got {shorten(turn)}')
    text = turn["value"]
    if _SURROGATE.search(text):
        raise ViCAError(f"turn {place} holds half a character, which is no text: {shorten(text)}")
    return turn["from"], text


def _images_first(text: str) -> str:
    pieces = text.split(IMAGE_MARK)
    if len(pieces) == 1:
        return text
    rest = "".join(pieces).strip()
    if IMAGE_MARK in rest:
        raise ViCAError(f"a message without its {IMAGE_MARK} marks holds another: {shorten(text)}")
    return (f"{IMAGE_MARK}\n" * (len(pieces) - 1) + rest).strip()


def _plain(turns: list[str], processor: ViCAProcessor, template: Template) -> tuple[list[int], list[int]]:
    """Returns ids and labels of image and caption only: the question's text is dropped."""
    if len(turns) != 2 or IMAGE_MARK not in turns[0]:
        raise ViCAError(f"template plain takes an image and its caption, not {len(turns)} turns: {shorten(turns[0])}")
    images = IMAGE_MARK * turns[0].count(IMAGE_MARK)
    ids = processor.tokenize(template.render([("user", images), ("assistant", turns[1])]))
    start = len(processor.tokenize(images))
    return ids, [IGNORE] * start + ids[start:]


def _chat(turns: list[str], processor: ViCAProcessor, template: Template) -> tuple[list[int], list[int]]:
    """Returns the whole text's ids, and labels by rounds that end with each stop token.

    The question of a round is tokenized once more to find its length. A stop token splits the text for every tokenizer,
    so the text before the round is not needed for this.
    """
    stop = processor.tokenize(template.stop, add_special_tokens=False)
    if stop != [processor.tokenizer.eos_token_id]:
        raise ViCAError(f"template {template.name} ends answers with {template.stop}, which is not the tokenizer's eos")
    messages = [(_ROLES[place % 2], text) for place, text in enumerate(turns)]
    if found := next((text for text in turns if template.stop in text), None):
        raise ViCAError(f"a message holds {template.stop}, the token that ends answers: {shorten(found)}")
    # As in LLaVA an empty answer is open and has no stop token: the round continues.
    answers = [place for place in range(1, len(turns), 2) if turns[place]]
    ids = processor.tokenize(template.render(messages))
    ends = [place for place, token in enumerate(ids, 1) if token == stop[0]]
    if len(ends) != len(answers) or ends[-1] != len(ids):
        raise ViCAError(f"the text has {len(ends)} stop tokens for {len(answers)} answers: {shorten(turns[0])}")
    labels, start, before = [], 0, ""
    for place, end in zip(answers, ends):
        asked = _asked(template.render(messages[:place]), before, processor, template)
        if ids[start : start + len(asked)] != asked:
            raise ViCAError(f"the answer's tokens cannot be told from the question's: {shorten(turns[place])}")
        labels += [IGNORE] * len(asked) + ids[start + len(asked) : end]
        start, before = end, template.render(messages[: place + 1])
    return ids, labels


def _asked(opened: str, before: str, processor: ViCAProcessor, template: Template) -> list[int]:
    """Returns the ids of a text that ends where an answer begins, without those of its beginning `before`."""
    if not before:
        return processor.tokenize(opened)
    return processor.tokenize(template.stop + opened.removeprefix(before), add_special_tokens=False)[1:]
