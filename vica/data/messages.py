"""Reads transformers' chat messages (roles, and contents of text and image parts) as turns and image sources."""

from collections.abc import Mapping, Sequence

from ..utils.errors import ViCAError
from .tokenizer import IMAGE_MARK

_SOURCE_KEYS = ("image", "url", "path", "base64")


def is_batch(conversation) -> bool:
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ViCAError(f"a conversation is a non-empty list of messages, got {shorten(conversation)}")
    return isinstance(conversation[0], (list, tuple))


def read_messages(messages: Sequence[Mapping]) -> tuple[list[tuple[str, str]], list]:
    """Returns the turns as (role, text) pairs, and the sources of their images in reading order."""
    turns, sources = [], []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ViCAError(f"a message is a dict with role and content, got {shorten(message)}")
        text, images = _read_content(message["content"])
        if images and message["role"] != "user":
            raise ViCAError(f"a message of role {message['role']!r} holds an image; only a user's may")
        turns.append((message["role"], f"{IMAGE_MARK}\n" * len(images) + text))
        sources += images
    return turns, sources


def _read_content(content) -> tuple[str, list]:
    """Returns a message's text, with several parts on separate lines, and the sources of its images."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, (list, tuple)):
        raise ViCAError(f"a message's content is a string or a list of parts, got {shorten(content)}")
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            images.append(_image_source(part))
        else:
            raise ViCAError(f"a part of a message's content is of type text or image, got {shorten(part)}")
    return "\n".join(texts), images


def _image_source(part: Mapping):
    """Returns a source that `load_image` takes; None for a bare placeholder."""
    if part["type"] == "image_url":  # OpenAI's form
        url = part.get("image_url")
        return url.get("url") if isinstance(url, Mapping) else url
    key = next((key for key in _SOURCE_KEYS if part.get(key) is not None), None)
    if key == "base64":
        return f"data:image/unknown;base64,{part[key]}"
    return None if key is None else part[key]


def sources_or_none(images: list[list]) -> list[list] | None:
    """Returns None if the messages hold only placeholders, no images: then the caller brings features."""
    given = [source is not None for sources in images for source in sources]
    if any(given) and not all(given):
        raise ViCAError(f"an image part names no source; give one of {', '.join(_SOURCE_KEYS)}")
    return images if any(given) else None


def shorten(value) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else text[:97] + "..."
