"""Define what callers give the engine and get back: requests, tokens and results."""

from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from ..data.images import as_list
from ..data.messages import shorten
from ..utils.errors import ViCAError

MAX_TEMPERATURE = 1e6  # far beyond any use, and low enough that no float32 overflows


@dataclass(eq=False)
class Request:
    """A question about any number of images.

    `prompt`: a rendered prompt with an `<image>` mark for each image, chat messages, or token ids with a placeholder
    for each image. `images`, in reading order: paths, URLs, bytes, PIL images, or features [tokens, width] already
    projected. Messages may hold their images themselves.

    Temperature 0 is greedy. `seed` None draws one; a given seed gives the same tokens whatever else is in the batch.
    """

    prompt: str | list[Any]
    images: list[Any] = field(default_factory=list)
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    id: Any = None  # the caller's own name for the request
    result: "Result | None" = field(default=None, init=False, repr=False)
    cancelled: bool = field(default=False, init=False, repr=False)  # by `Engine.cancel`, until the result is there

    @classmethod
    def ask(cls, question: str, images: Any = (), **options: Any) -> "Request":
        """Returns a question about some images, in the model's own template."""
        images = as_list(images)
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        return cls([{"role": "user", "content": content}], images, **options)

    @property
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return list(stops) if isinstance(stops, (list, tuple)) else []  # `check` refuses anything else

    def check(self) -> None:
        """Raises ViCAError for settings that cannot be followed."""
        for name, number, least in (("max_new_tokens", self.max_new_tokens, 1), ("top_k", self.top_k, 0)):
            if not is_whole(number) or number < least:
                raise ViCAError(f"{name} is {shorten(number)}; it must be a whole number from {least}")
        if not (isinstance(self.temperature, Real) and 0 <= self.temperature <= MAX_TEMPERATURE):
            value = shorten(self.temperature)
            raise ViCAError(f"temperature is {value}; it must be a number from 0 to {MAX_TEMPERATURE:g}")
        if not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise ViCAError(f"top_p is {shorten(self.top_p)}; it must be above 0 and at most 1")
        if self.seed is not None and not (is_whole(self.seed) and 0 <= self.seed < 2**63):
            raise ViCAError(f"seed is {shorten(self.seed)}; it must be a whole number from 0 to 2**63 - 1, or None")
        listed = self.stop is None or isinstance(self.stop, (str, list, tuple))
        if not listed or not all(isinstance(s, str) and s for s in self.stops):
            raise ViCAError(f"stop is {shorten(self.stop)}; it must be one or more non-empty strings")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, Python's or numpy's; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


class Token(int):
    """A token id as the engine streams it, with the text that it completes."""

    text: str

    def __new__(cls, value: int, text: str = "") -> "Token":
        token = super().__new__(cls, value)
        token.text = text
        return token


@dataclass
class Result:
    """An answer.

    `finish_reason`: "stop" (end mark or stop string), "length", "cancelled", or "error", which `error` explains.
    `tokens` are those of `model.generate`, the end mark included; `text` ends before a stop string. A result does not
    hold its request: two objects that hold each other live until Python's collector runs, and images are large.
    """

    id: Any  # that of the request
    text: str
    tokens: list[int]
    finish_reason: str
    error: str | None = None
    prompt_tokens: int = 0  # visual tokens included
    queued_s: float = 0.0  # seconds from submission to admission
    first_token_s: float | None = None  # seconds from submission
    total_s: float = 0.0
