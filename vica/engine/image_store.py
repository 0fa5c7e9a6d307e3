"""Turn image sources into contents: what a request holds of an image until the engine has computed it.

A source is a path, a URL, bytes, an open file, a PIL image or features. `get` identifies its content by a digest,
`load` makes it ready for the vision tower. Requests about the same content share what was loaded while any of them
waits, so each content is decoded once.
"""

import io
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image

from ..data.images import load_image
from ..utils.errors import ViCAError
from ..utils.hashing import digest, digest_tensor

# Nanoseconds after which a file's time tells whether it has changed. Two changes within one tick of a coarse clock
# leave the same time.
SETTLED = 2 * 10**9
GIVEN = "features-"  # begins the keys of features that the caller brings; saved image memories hold these keys
DECODING_LOCKS = 64


@dataclass(eq=False)
class Loaded:
    """A content ready for the tower, shared by the requests about it. Empty before `load`, and again once the engine
    has made an entry of the image memory from it."""

    pixels: np.ndarray | None = None  # [3, H, W]
    features: torch.Tensor | None = None  # [tokens, width]
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def empty(self) -> bool:
        return self.pixels is None and self.features is None

    def clear(self) -> None:
        self.pixels = self.features = None


@dataclass(eq=False)
class ImageContent:
    """One image of one request."""

    key: str  # names the content in the image memory
    size: int  # visual tokens
    source: Any  # what to load; for URLs and open files what was read to identify them
    loaded: Loaded


class ImageStore:
    """`make_pixels` turns an image into the tower's input [3, H, W]; None where the model has no tower.
    `visual_tokens`: of one image. `width`: of features. All methods may be called from several threads."""

    def __init__(self, make_pixels: Callable[[Any], np.ndarray] | None, visual_tokens: int, width: int) -> None:
        self.make_pixels, self.visual_tokens, self.width = make_pixels, visual_tokens, width
        self._sharing = threading.Lock()
        self._loaded: WeakValueDictionary[str, Loaded] = WeakValueDictionary()  # contents live as long as a request
        self._decoding = [threading.Lock() for _ in range(DECODING_LOCKS)]

    def __len__(self) -> int:
        """Returns the number of contents that requests hold."""
        return len(self._loaded)

    def get(self, source: Any) -> ImageContent:
        """Returns the source's content, unloaded. A file is read for its digest, but not decoded."""
        if isinstance(source, torch.Tensor) and source.dim() == 2:
            return self._get_features(source)
        if self.make_pixels is None or not self.visual_tokens:
            raise ViCAError("this model has no vision tower: give images as features [tokens, width]")
        key, source = self._identify(source)
        return ImageContent(key, self.visual_tokens, source, self._share(key))

    def load(self, content: ImageContent) -> None:
        """Gives the content its pixels or features, unless it has them.

        A file is read once more, and its content then takes the key of what was read: what is kept under a key is that
        content, even if the file has changed since `get`.
        """
        if not content.loaded.empty:
            return
        source = content.source
        if isinstance(source, (str, os.PathLike)):
            content.key, source = self._read(source)
            content.loaded = self._share(content.key)
        loaded = content.loaded
        with loaded.lock:
            if not loaded.empty:
                return
            if content.key.startswith(GIVEN):
                loaded.features = source.detach().clone()  # the image memory keeps them; the caller may change its own
            elif self.make_pixels is not None:
                loaded.pixels = self.make_pixels(source)

    def _share(self, key: str) -> Loaded:
        with self._sharing:
            return self._loaded.setdefault(key, Loaded())

    def _get_features(self, features: torch.Tensor) -> ImageContent:
        if features.shape[1] != self.width or not len(features) or not features.is_floating_point():
            raise ViCAError(f"image features are {list(features.shape)}; they must be floats [tokens, {self.width}]")
        if not features.isfinite().all():
            raise ViCAError("image features hold NaN or infinity")
        key = GIVEN + digest_tensor(features)
        return ImageContent(key, len(features), features, self._share(key))

    def _identify(self, source: Any) -> tuple[str, Any]:
        """Returns the digest of a file's or of bytes' content as it comes, else of the pixels; and what to load."""
        if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
            with suppress(OSError):  # load_image then says what is wrong
                return digest_file(os.path.abspath(source)), source
        if isinstance(source, (bytes, bytearray, memoryview)):
            content = bytes(source)  # the owner of a bytearray may change it
            return digest(content), content
        if isinstance(source, Image.Image):
            # Pillow decodes an opened file here, which two threads must not do at once.
            with self._decoding[id(source) % DECODING_LOCKS]:
                image = load_image(source)
        else:
            image = source = load_image(source)
        return digest(f"{image.size}".encode() + image.tobytes()), source

    def _read(self, path: str | os.PathLike[str]) -> tuple[str, Any]:
        """Returns a file's digest and its content, both of one reading."""
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError:
            return self._identify(load_image(path))  # load_image says what is wrong, or downloads a URL
        named = io.BytesIO(content)
        named.name = os.fspath(path)  # for error messages
        return digest(content), named


def digest_file(path: str) -> str:
    """Returns the digest of a file's content. A file that has kept size and time since the last call is not read."""
    status = os.stat(path)
    if time.time_ns() - status.st_mtime_ns < SETTLED:
        return digest_now(path)
    return digest_once(path, status.st_size, status.st_mtime_ns)


def digest_now(path: str) -> str:
    with open(path, "rb") as file:
        return digest(file.read())


@lru_cache(maxsize=2**16)
def digest_once(path: str, size: int, changed: int) -> str:
    return digest_now(path)
