"""Answers questions and yields the answers as they come: through the engine, or by the plain model for the mask
variant."""

from collections.abc import Callable, Iterable, Iterator

import torch

from ..data.images import load_image
from ..engine import Engine, Request
from ..model.generation import PLAIN
from ..plan.sizes import room_for_answer
from ..utils.errors import ViCAError
from .task import Question, StoredImage

Answered = tuple[Question, str | None, str | None]  # the question, its answer or None, the error or None
Answerer = Callable[[Iterable[Question], int], Iterator[Answered]]


def answerer(model, processor, max_batch: int | None = None) -> Answerer:
    """Returns a function that answers questions greedily, in any order, with a given number of new tokens at most."""
    if model.config.variant == "mask":
        return lambda questions, tokens: by_model(model, processor, questions, tokens)
    engine = Engine(model, processor, max_batch=max_batch)
    return lambda questions, tokens: by_engine(engine, questions, tokens)


def by_engine(engine: Engine, questions: Iterable[Question], tokens: int, **options) -> Iterator[Answered]:
    """Yields the engine's answers. `options` are those of a request."""
    failed: list[Answered] = []

    def requests() -> Iterator[Request]:
        for question in questions:
            try:
                yield Request.ask(question.prompt, sources(question), max_new_tokens=tokens, id=question, **options)
            except ViCAError as error:  # raised by a stored image; the engine's workers open image files
                failed.append((question, None, str(error)))

    for request in engine.results(requests()):
        result = request.result
        assert result is not None  # `results` yields a request once it is done
        yield request.id, None if result.error else result.text.strip(), result.error
    yield from failed


def by_model(model, processor, questions: Iterable[Question], tokens: int) -> Iterator[Answered]:
    """Yields the model's answers, with the engine's errors and limits: without its refusal the model would answer
    beyond its positions."""
    for question in questions:
        try:
            inputs = processor.ask(question.prompt, [load_image(source) for source in sources(question)])
            room = room_for_answer(model.config, inputs["input_ids"][0].tolist())
        except Exception as error:  # one question's content may raise anything; the others continue
            yield question, None, " ".join(str(error).split()) or type(error).__name__
            continue
        with torch.inference_mode():
            ids = model.generate(**inputs.to(model.device), max_new_tokens=min(tokens, room), do_sample=False, **PLAIN)
        yield question, processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(), None


def sources(question: Question) -> list:
    image = question.image
    if not isinstance(image, StoredImage):
        return [] if image is None else [image]
    try:
        return [image.read()]
    except Exception as error:  # a damaged file of a dataset raises nearly any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ViCAError(f"image {image.key} cannot be read: {reason}") from error
