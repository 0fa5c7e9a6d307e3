"""A request made ready for the model: its token ids, and its images as pixels or features with their content's hash."""

import io
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image

from ..data.conversation import get_template
from ..data.images import as_list, load_image
from ..data.messages import read_messages
from ..data.processor import ViCAProcessor
from ..data.tokenizer import IMAGE_MARK
from ..utils.errors import ViCAError
from ..utils.hashing import digest, digest_tensor
from .layout import Layout, lay_out
from .request import Request

SETTLED = 2 * 10**9  # ns after a change from which on another would have another time, however coarse the clock
HEADS, LONGEST_HEAD = 64, 4096  # beginnings of prompts whose ids are kept, and characters of one
GIVEN = "features-"  # what the keys of features begin with that the caller brings


@dataclass(eq=False)
class ImageInput:
    """One image's content, whatever source it comes from. Requests about it share this object while any waits."""

    key: str
    size: int  # visual tokens
    pixels: np.ndarray | None = None  # [3, H, W]; these or features are there from `load` until an entry is made
    features: torch.Tensor | None = None  # [tokens, width]
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False)
class Prepared:
    layout: Layout
    images: list[ImageInput]
    sources: list  # of each: what `load_image` takes, or features


class Inputs:
    """Called from several threads. `known(key, start)`: whether the image memory needs no pixels of an image.
    `keep_heads`: what prompts begin with may be kept."""

    def __init__(self, config, processor: ViCAProcessor | None, visual_tokens: int, known, keep_heads: bool = True):
        self.config, self.processor, self.visual_tokens, self.known = config, processor, visual_tokens, known
        # transformers' configs are slow to ask
        self.plan, self.image_token = config.plan, config.image_token_index
        self.vocabulary, self.width = config.text_config.vocab_size, config.text_config.hidden_size
        self.lock = threading.Lock()
        self.keep_heads, self.heads = keep_heads, dict[str, list[int]]()
        self.image_lock = threading.Lock()
        self.decoding = [threading.Lock() for _ in range(64)]
        self.waiting: WeakValueDictionary[str, ImageInput] = WeakValueDictionary()
        self.template_prefix = self._template_prefix()

    def prepare(self, request: Request) -> Prepared:
        request.check()
        ids, sources = self._tokenize(request)
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
        images, sources = zip(*map(self._image, sources)) if sources else ((), ())
        layout = lay_out(ids, [x.size for x in images], self.image_token, self.plan, self.vocabulary)
        if (
            not images
            and ids[: len(self.template_prefix)] == self.template_prefix
            and len(ids) > len(self.template_prefix)
        ):
            layout.prefix = len(self.template_prefix)
        images = [
            image if self.known(image.key, place.start) else self.load(image, source)
            for image, source, place in zip(images, sources, layout.images)
        ]
        return Prepared(layout, images, sources)

    def _tokenize(self, request: Request) -> tuple[list[int], list]:
        prompt, images = request.prompt, as_list(request.images)
        if (
            isinstance(prompt, (list, tuple))
            and prompt
            and all(issubclass(x, (int, np.integer)) for x in {*map(type, prompt)})
        ):
            return [*map(int, prompt)], images
        if isinstance(prompt, (list, tuple)) and not prompt:
            raise ViCAError("the prompt is empty")
        if self.processor is None:
            raise ViCAError("the engine has no processor: give prompts as token ids")
        if isinstance(prompt, (list, tuple)):
            turns, sources = read_messages(prompt)
            given = [x for x in sources if x is not None]
            if given and (images or len(given) < len(sources)):
                raise ViCAError("give the images in the messages or in the request's images, not in both")
            images = images or given
            prompt = get_template(self.processor.conversation).render(turns)
        if not isinstance(prompt, str):
            raise ViCAError(f"a prompt is a text, chat messages or token ids, got {type(prompt).__name__}")
        with self.lock:  # tokenizers lend their state to one thread at a time
            return self._ids(prompt), images

    def _ids(self, prompt: str) -> list[int]:
        """Many prompts are the same up to their image: that much is tokenized once, which changes no id, as what stands
        between images is tokenized on its own anyway."""
        head, mark, rest = prompt.partition(IMAGE_MARK)
        if not (mark and self.keep_heads and len(head) <= LONGEST_HEAD):
            return self.processor.tokenize(prompt)
        if head not in self.heads:
            if len(self.heads) >= HEADS:
                self.heads.clear()
            self.heads[head] = self.processor.tokenize(head)
        return self.heads[head] + self.processor.tokenize(mark + rest, add_special_tokens=False)

    def _template_prefix(self) -> list[int]:
        """What all prompts of the template begin with when they hold no image."""
        if self.processor is None:
            return []
        template = get_template(self.processor.conversation)
        one, other = (self.processor.tokenize(template.render([("user", x)])) for x in ("Yes", "a"))
        return os.path.commonprefix([one, other])

    def _image(self, source) -> tuple[ImageInput, object]:
        """And what to load, which for URLs and open files is what was loaded to know them."""
        if isinstance(source, torch.Tensor) and source.dim() == 2:
            if source.shape[1] != self.width or not len(source) or not source.is_floating_point():
                raise ViCAError(f"image features are {list(source.shape)}; they must be floats [tokens, {self.width}]")
            if not source.isfinite().all():
                raise ViCAError("image features hold NaN or infinity")
            return self._shared(GIVEN + digest_tensor(source), len(source)), source
        if self.processor is None or self.processor.image_processor is None or not self.visual_tokens:
            raise ViCAError("this model has no vision tower: give images as features [tokens, width]")
        key, source = self._identify(source)
        return self._shared(key, self.visual_tokens), source

    def _shared(self, key: str, size: int) -> ImageInput:
        with self.image_lock:
            return self.waiting.setdefault(key, ImageInput(key, size))

    def _identify(self, source) -> tuple[str, object]:
        """The digest of the content as it comes, so that a known file is not even decoded."""
        if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
            with suppress(OSError):  # load_image says what is wrong
                return digest_file(os.path.abspath(source)), source
        if isinstance(source, (bytes, bytearray, memoryview)):
            content = bytes(source)  # a copy of what its owner may change
            return digest(content), content
        if not isinstance(source, Image.Image):
            image = source = load_image(source)
        else:  # an opened file is decoded here, which two threads must not do at once
            with self.decoding[id(source) % len(self.decoding)]:
                image = load_image(source)
        return digest(f"{image.size}".encode() + image.tobytes()), source

    def load(self, image: ImageInput, source) -> ImageInput:
        """With pixels or features: another image where the source is a file that has changed since it was identified.
        Features are copied: they will be kept, and the caller may change theirs."""
        if image.features is not None or image.pixels is not None:
            return image
        if isinstance(source, (str, os.PathLike)):
            key, source = self._read(source)
            image = self._shared(key, image.size)
        with image.lock:
            if image.features is not None or image.pixels is not None:
                return image
            if image.key.startswith(GIVEN):
                image.features = source.detach().clone()
            else:
                image.pixels = self._pixels(source)
        return image

    def _read(self, path) -> tuple[str, object]:
        """A file's digest and content, of one reading."""
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError:
            return self._identify(load_image(path))  # which says what is wrong
        named = io.BytesIO(content)
        named.name = os.fspath(path)
        return digest(content), named

    def _pixels(self, source) -> np.ndarray:
        (pixels,) = self.processor.process_images([source])
        side = self.config.vision_config.image_size
        if pixels.shape != (3, side, side):
            raise ViCAError(f"the processor made {list(pixels.shape)} of an image; the tower takes [3, {side}, {side}]")
        return pixels


def digest_file(path: str) -> str:
    status = os.stat(path)
    if time.time_ns() - status.st_mtime_ns < SETTLED:
        return _digest_file.__wrapped__(path)
    return _digest_file(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2**16)
def _digest_file(path: str, size: int = 0, changed: int = 0) -> str:
    with open(path, "rb") as file:
        return digest(file.read())
