"""Loads one image from any source as an RGB PIL image.

The EXIF orientation is ignored, as in LLaVA: the released weights saw the stored pixels.
"""

import base64
import binascii
import os
import urllib.error
import urllib.request
import warnings
from io import BytesIO

import numpy as np
from PIL import Image

from ..utils.errors import ViCAError

DOWNLOAD_SECONDS = 20
DOWNLOAD_BYTES = 64 * 2**20
_SHOWN_CHARACTERS = 120


def as_list(images) -> list:
    """Returns the images as a list. A single image is not the sequence that Python would take it for."""
    alone = isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image, np.ndarray)) or hasattr(images, "read")
    if alone or getattr(images, "ndim", None) == 2:  # a tensor of features; torch is not imported to ask
        return [images]
    return [] if images is None else list(images)


def load_image(source) -> Image.Image:
    """Returns the image of `source`: a path, an http(s) or base64 data URL, bytes, a binary file, a PIL image or a
    uint8 array [H, W, 3]."""
    name = _describe(source)
    try:
        with warnings.catch_warnings():  # Pillow's warning would only repeat our refusal
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = _open(source, name)
        _refuse_bomb(image, name)
        return image.convert("RGB")
    except ViCAError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ViCAError(_bomb_message(name)) from None
    except FileNotFoundError:
        raise ViCAError(f"image {name}: no such file") from None
    except IsADirectoryError:
        raise ViCAError(f"image {name}: is a directory, not an image file") from None
    except Image.UnidentifiedImageError:
        raise ViCAError(f"image {name}: not an image in a format that Pillow reads") from None
    except Exception as error:  # Pillow's decoders raise nearly any type for a broken file
        raise ViCAError(f"image {name}: cannot be read ({_one_line(error)})") from error


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Returns the image in the middle of a square of that colour; an odd pixel goes below or to the right of it."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    _refuse_long(image, side * side, "padded to a square")
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def check_enlarged(image: Image.Image, shorter_side: int) -> None:
    """Checks that the image still fits in memory after CLIP's preprocessing has resized its shorter side, before the
    crop."""
    width, height = image.size
    _refuse_long(image, shorter_side**2 * max(width, height) // min(width, height), f"resized to {shorter_side} pixels")


def _refuse_long(image: Image.Image, pixels: int, done: str) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and pixels > 2 * Image.MAX_IMAGE_PIXELS:
        width, height = image.size
        raise ViCAError(f"an image of {width}x{height} is too long to be {done}; make it smaller")


def _open(source, name: str) -> Image.Image:
    """Returns the image, usually with its pixels not yet decoded."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        return Image.open(BytesIO(_download(source, name)))
    if isinstance(source, str) and source[:5].lower() == "data:":
        return Image.open(BytesIO(_decode_data_url(source, name)))
    if isinstance(source, (str, os.PathLike)):
        return Image.open(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Image.open(BytesIO(source))
    if hasattr(source, "read"):
        return Image.open(BytesIO(source.read()))
    if hasattr(source, "__array__"):
        return _from_array(np.asarray(source), name)
    raise ViCAError(
        f"image {name}: is neither a path, a URL, bytes, a file, a PIL image nor a uint8 array [height, width, 3]"
    )


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ViCAError(f"image {name}: an array must be uint8 [height, width, 3], got {array.dtype} {[*array.shape]}")
    return Image.fromarray(array)


def _refuse_bomb(image: Image.Image, name: str) -> None:
    """Raises above Pillow's own limit. Pillow itself only warns there and refuses at twice as much."""
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ViCAError(_bomb_message(f"{name} ({width}x{height})"))


def _bomb_message(name: str) -> str:
    return f"image {name}: more than PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS} pixels; make it smaller"


def _download(url: str, name: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "vica"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as answer:
            content = answer.read(DOWNLOAD_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ViCAError(f"image {name}: the server answered {error.code} {error.reason}") from error
    except OSError as error:
        raise ViCAError(f"image {name}: cannot be downloaded ({_one_line(error)})") from error
    if len(content) > DOWNLOAD_BYTES:
        raise ViCAError(f"image {name}: larger than the {DOWNLOAD_BYTES // 2**20} MiB that are downloaded")
    return content


def _decode_data_url(url: str, name: str) -> bytes:
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ViCAError(f"image {name}: a data URL must read data:image/<type>;base64,<content>")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ViCAError(f"image {name}: its base64 content is broken ({_one_line(error)})") from error


def _describe(source) -> str:
    """Returns the source's name for messages: as the user wrote it (a long path by its end, a long URL by its
    beginning), or its type."""
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None)
    if isinstance(name, (str, os.PathLike)):
        text = repr(os.fspath(name))
        if len(text) <= _SHOWN_CHARACTERS:
            return text
        if text[1:9].lower().startswith(("http://", "https://", "data:")):
            return text[: _SHOWN_CHARACTERS - 3] + "..."
        return f"{text[0]}...{text[4 - _SHOWN_CHARACTERS :]}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"of {len(source)} bytes"
    return f"of type {type(source).__name__}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN_CHARACTERS] or type(error).__name__
