"""From questions to answers, as they come: through the engine, or, for the mask variant, by the plain model."""

from collections.abc import Callable, Iterable, Iterator

import torch

from ..data.images import load_image
from ..engine import Engine, Request
from ..model.generation import PLAIN
from ..plan.sizes import room_for_answer
from ..utils.errors import ViCAError
from .task import Question, StoredImage

Answered = tuple[Question, str | None, str | None]  # the question, its answer, or why there is none
Answerer = Callable[[Iterable[Question], int], Iterator[Answered]]


def answerer(model, processor, max_batch: int | None = None) -> Answerer:
    """Greedy answers of so many new tokens at most, in any order."""
    if model.config.variant == "mask":
        return lambda questions, tokens: by_model(model, processor, questions, tokens)
    engine = Engine(model, processor, max_batch=max_batch)
    return lambda questions, tokens: by_engine(engine, questions, tokens)


def by_engine(engine: Engine, questions: Iterable[Question], tokens: int, **options) -> Iterator[Answered]:
    """`options` are a request's."""
    failed: list[Answered] = []

    def requests() -> Iterator[Request]:
        for question in questions:
            try:
                yield Request.ask(question.prompt, sources(question), max_new_tokens=tokens, id=question, **options)
            except ViCAError as error:  # of a stored image; files are opened by the engine's workers
                failed.append((question, None, str(error)))

    for request in engine.results(requests()):
        result = request.result
        yield request.id, None if result.error else result.text.strip(), result.error
    yield from failed


def by_model(model, processor, questions: Iterable[Question], tokens: int) -> Iterator[Answered]:
    """With the engine's errors and ends: what it refuses would be answered beyond the model's positions here."""
    for question in questions:
        try:
            inputs = processor.ask(question.prompt, [load_image(source) for source in sources(question)])
            room = room_for_answer(model.config, inputs["input_ids"][0].tolist())
        except Exception as error:  # whatever one question's content raises, the others go on
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
    except Exception as error:  # a dataset's file that is damaged raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ViCAError(f"image {image.key} cannot be read: {reason}") from error
