"""Translates lmms-eval's model arguments, generation settings, prompts and order of requests into our own terms.
Nothing here needs lmms-eval."""

import logging
import re
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from ..data.conversation import get_template
from ..data.messages import shorten
from ..data.tokenizer import IMAGE_MARK
from ..utils.errors import ViCAError
from ..utils.hashing import digest

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024  # if a task names no number: the default of lmms-eval's own LLaVA
TAKEN = ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "until", "seed")
# Settings that change answers and that the engine lacks, each with the value that leaves answers as they are.
REFUSED = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "no_repeat_ngram_size": 0}
SHOWS_IMAGE = re.compile(r"(image|img)_?(id|source|name|path|file|file_?name)?", re.IGNORECASE)


# --- model arguments ----------------------------------------------------------------------------------------------


def parse_layers(value) -> list[int] | None:
    """Returns the layers of a --model_args value. lmms-eval splits its arguments at commas, in older versions also
    inside brackets: "[0,1,7]", "[0;1;7]" and "0 1 7" all work, and so does the bare number that it makes of a list of
    one layer."""
    if value is None or isinstance(value, (list, tuple)):
        return value if value is None else list(value)
    text = str(value).strip()
    layers = re.split(r"[\s,;]+", text.strip("[] \t"))
    if not all(x.isdecimal() for x in layers) and text != "[]":
        raise ViCAError(f"t2v_layers is {shorten(value)}; give layer numbers as [0,1,7], [0;1;7] or '0 1 7'")
    return [int(x) for x in layers if x]


def batch_limit(batch_size, max_batch_size=None, max_batch=None) -> int | None:
    """Returns the number of requests at a time; None leaves it to memory. `--batch_size auto` defers to
    `--max_batch_size`."""
    if max_batch is not None:
        return positive("max_batch", max_batch)
    if str(batch_size).split(":")[0] == "auto":
        return None if max_batch_size is None else positive("max_batch_size", max_batch_size)
    return positive("batch_size", batch_size)


def positive(name: str, value) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ViCAError(
            f"{name} is {shorten(value)}; it must be a whole number from 1" + ", or auto" * ("size" in name)
        )
    return int(value)


# --- generation settings ------------------------------------------------------------------------------------------


def generation_options(settings: Mapping[str, Any]) -> dict:
    """Returns a task's generation_kwargs as settings of a Request."""
    given = {name: value for name, value in settings.items() if value not in (None, "None")}
    for name, neutral in REFUSED.items():
        if given.get(name, neutral) != neutral:
            raise ViCAError(
                f"the task asks for {name}={given[name]}, which the engine does not know; "
                f"--gen_kwargs {name}={neutral} asks without it"
            )
    for name in given.keys() - {*TAKEN, *REFUSED}:
        warn_ignored(name)
    temperature, top_p = temperature_of(given), given.get("top_p", 1.0)
    if temperature == 0 or top_p == 0:  # tasks name a top_p of 0 to mean greedy
        temperature, top_p = 0.0, 1.0
    return dict(
        max_new_tokens=given.get("max_new_tokens", MAX_NEW_TOKENS),
        temperature=temperature,
        top_p=top_p,
        top_k=given.get("top_k", 0),
        seed=given.get("seed"),
        stop=stops_of(given.get("until")),
    )


def temperature_of(settings: Mapping[str, Any]) -> float:
    """Returns the temperature. do_sample decides, as in transformers; if a task does not name it, its temperature
    does."""
    temperature = settings.get("temperature")
    if settings.get("do_sample", bool(temperature)):
        return 1.0 if temperature is None else temperature
    return 0.0


def stops_of(until) -> list[str] | None:
    """Returns the stop texts. Empty ones are dropped: they would end every answer at once."""
    texts = [until] if isinstance(until, str) else until or []
    return [text for text in texts if text] or None


@lru_cache(None)
def warn_ignored(name: str) -> None:
    log.warning("a task's generation_kwargs name %s, which is ignored", name)


# --- prompts ------------------------------------------------------------------------------------------------------


def turn_text(context: str, images: int) -> str:
    """Returns the user's turn. If the task marks no places for its images, each stands in front on a line of its
    own."""
    return context if IMAGE_MARK in context else f"{IMAGE_MARK}\n" * images + context


def prompt_of(conversation: str, context: str, images: int) -> str:
    return get_template(conversation).render([("user", turn_text(context, images))])


def as_images(visuals) -> list:
    """Returns the images of a task's doc_to_visual: a list, one image, or None; or a list of None."""
    visuals = visuals if isinstance(visuals, (list, tuple)) else [visuals]
    return [visual for visual in visuals if visual is not None]


# --- order --------------------------------------------------------------------------------------------------------


def grouped(keys: Sequence[Hashable]) -> list[int]:
    """Returns all places, those with the same key next to each other."""
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return [place for group in places.values() for place in group]


class ImageKeys:
    """Returns a key by which documents show the same picture, from the data that their datasets store, without decoding
    it. The key only orders the questions; if a dataset does not show its images, each document has a key of its own."""

    def __init__(self, datasets: Mapping[str, Mapping[str, Any]]):
        self.datasets = datasets
        self.rows: dict[tuple[str, str], Any] = {}

    def __call__(self, task: str, split: str, doc: int) -> Hashable:
        if (task, split) not in self.rows:
            self.rows[task, split] = image_columns(self.datasets[task][split])
        rows = self.rows[task, split]
        return (task, split, doc) if rows is None else tuple(map(content_key, rows[doc].values()))


def image_columns(dataset):
    """Returns the dataset's columns that name its images, else those that hold them, as they are stored; None if
    neither."""
    from datasets import Dataset, Image, Value

    if not isinstance(dataset, Dataset):
        return None
    features = dataset.features
    if named := [x for x in features if isinstance(features[x], Value) and SHOWS_IMAGE.fullmatch(x)]:
        return dataset.select_columns(named)
    if not (stored := [x for x in features if isinstance(features[x], Image)]):
        return None
    rows = dataset.select_columns(stored)
    for column in stored:
        rows = rows.cast_column(column, Image(decode=False))
    return rows


def content_key(value) -> Hashable:
    if isinstance(value, dict):  # a stored image
        return digest(value["bytes"]) if value["bytes"] is not None else value["path"]
    return value


def prefetch(make: Callable, items: Iterable, workers: int) -> Iterator:
    """Yields `make` of each item, in order, from threads that run a little ahead of the consumer."""
    with ThreadPoolExecutor(workers, "vica-documents") as threads:
        made: deque[Future] = deque()
        try:
            for item in items:
                made.append(threads.submit(make, item))
                if len(made) > 4 * workers:
                    yield made.popleft().result()
            while made:
                yield made.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
