"""Prepare requests for the model: token ids, the prompt's layout, and the images' contents."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..data.conversation import get_template
from ..data.images import as_list
from ..data.messages import read_messages
from ..data.processor import ViCAProcessor
from ..data.tokenizer import IMAGE_MARK
from ..model.prompt import PromptLayout, lay_out
from ..plan.config import ViCAConfig
from ..plan.layer import updates_visual
from ..utils.errors import ViCAError
from .image_store import ImageContent, ImageStore
from .request import Request

MAX_BEGINNINGS = 64  # beginnings of prompts whose ids are kept
MAX_BEGINNING_LENGTH = 4096  # characters of one
NO_PROCESSOR = "the engine has no processor: give prompts as token ids"


@dataclass(eq=False)
class Prepared:
    """A request ready for admission."""

    layout: PromptLayout
    images: list[ImageContent]


class Inputs:
    """Prepares requests for one model, from several threads.

    `knows(key, start)`: whether the image memory needs no pixels for an image at this position.
    `keep_beginnings`: whether ids of prompts' beginnings may outlive their request.
    """

    def __init__(
        self,
        config: ViCAConfig,
        processor: ViCAProcessor | None,
        visual_tokens: int,
        knows: Callable[[str, int], bool],
        keep_beginnings: bool = True,
    ) -> None:
        self.config, self.processor, self.visual_tokens, self.knows = config, processor, visual_tokens, knows
        # Read once: attributes of transformers' configs are slow.
        text: Any = config.text_config
        self.updates_visual, self.image_token = updates_visual(config.plan), config.image_token_index
        self.vocabulary, self.width = text.vocab_size, text.hidden_size
        self.tokenizing = threading.Lock()  # a tokenizer serves one thread at a time
        self.keep_beginnings, self.beginnings = keep_beginnings, dict[str, list[int]]()
        self.images = ImageStore(pixel_maker(config, processor), visual_tokens, self.width)
        self.template_prefix = self._template_prefix()

    def prepare(self, request: Request) -> Prepared:
        """Returns what the engine needs of a request. Raises ViCAError where it cannot be answered."""
        request.check()
        ids, sources = self._ids_and_sources(request)
        placeholders = ids.count(self.image_token)
        if placeholders != len(sources):
            raise ViCAError(
                f"the prompt has {placeholders} places for images, but {len(sources)} were given; a text prompt marks "
                "each by <image>, messages and Request.ask need no mark"
            )
        if sources:
            self.config.require_layers()
        if request.stops and self.processor is None:
            raise ViCAError("the engine has no processor: it cannot look for stop strings")
        images = [self.images.get(source) for source in sources]
        sizes = [image.size for image in images]
        layout = lay_out(ids, sizes, self.image_token, self.vocabulary, self.updates_visual)
        if not images:
            layout.prefix = self._shared_beginning(ids)
        for image, place in zip(images, layout.images):
            if not self.knows(image.key, place.start):
                self.images.load(image)
        return Prepared(layout, images)

    def tokenize(self, prompt: str) -> list[int]:
        """Returns the prompt's ids, and keeps those of its beginning: many prompts are the same up to their image.
        Text between images is tokenized on its own anyway, so this changes no id."""
        processor = self.processor
        if processor is None:
            raise ViCAError(NO_PROCESSOR)
        beginning, mark, rest = prompt.partition(IMAGE_MARK)
        if not (mark and self.keep_beginnings and len(beginning) <= MAX_BEGINNING_LENGTH):
            return processor.tokenize(prompt)
        if beginning not in self.beginnings:
            if len(self.beginnings) >= MAX_BEGINNINGS:
                self.beginnings.clear()
            self.beginnings[beginning] = processor.tokenize(beginning)
        return self.beginnings[beginning] + processor.tokenize(mark + rest, add_special_tokens=False)

    def _ids_and_sources(self, request: Request) -> tuple[list[int], Sequence[Any]]:
        prompt, images = request.prompt, as_list(request.images)
        if are_ids(prompt):
            return [*map(int, prompt)], images
        if isinstance(prompt, (list, tuple)) and not prompt:
            raise ViCAError("the prompt is empty")
        if self.processor is None:
            raise ViCAError(NO_PROCESSOR)
        if isinstance(prompt, (list, tuple)):
            turns, sources = read_messages(prompt)
            given = [x for x in sources if x is not None]
            if given and (images or len(given) < len(sources)):
                raise ViCAError("give the images in the messages or in the request's images, not in both")
            images = images or given
            prompt = get_template(self.processor.conversation).render(turns)
        if not isinstance(prompt, str):
            raise ViCAError(f"a prompt is a text, chat messages or token ids, got {type(prompt).__name__}")
        with self.tokenizing:
            return self.tokenize(prompt), images

    def _shared_beginning(self, ids: list[int]) -> int:
        """Returns the tokens of a prompt without images that all such prompts of the template share."""
        count = len(self.template_prefix)
        return count if len(ids) > count and ids[:count] == self.template_prefix else 0

    def _template_prefix(self) -> list[int]:
        if self.processor is None:
            return []
        template = get_template(self.processor.conversation)
        one, other = (self.processor.tokenize(template.render([("user", x)])) for x in ("Yes", "a"))
        return list(os.path.commonprefix([one, other]))


def pixel_maker(config: ViCAConfig, processor: ViCAProcessor | None) -> Callable[[Any], np.ndarray] | None:
    """Returns a function that makes an image what the tower takes, or None where the model has no tower."""
    vision: Any = config.vision_config
    if vision is None or processor is None or processor.image_processor is None:
        return None
    return partial(pixels_of, processor, vision.image_size)


def pixels_of(processor: ViCAProcessor, side: int, source: Any) -> np.ndarray:
    pixels: np.ndarray
    (pixels,) = processor.process_images([source])
    if pixels.shape != (3, side, side):
        raise ViCAError(f"the processor made {list(pixels.shape)} of an image; the tower takes [3, {side}, {side}]")
    return pixels


def are_ids(prompt: Any) -> bool:
    """Whether a prompt is a non-empty list of whole numbers."""
    return (
        isinstance(prompt, (list, tuple))
        and bool(prompt)
        and all(issubclass(kind, (int, np.integer)) for kind in {*map(type, prompt)})
    )
