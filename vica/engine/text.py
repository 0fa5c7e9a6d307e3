"""Decode tokens as they come: the text that a token completes, and whether a stop string has appeared."""

from ..data.processor import ViCAProcessor


class TextStream:
    """The text of one answer. It holds back an end that may begin a stop string until that is decided."""

    def __init__(self, processor: ViCAProcessor, stops: list[str]) -> None:
        self.processor, self.stops = processor, stops
        self.tokens: list[int] = []
        # Tokens before `read` are in `text`; those from `left` on are decoded again with the next, as their context.
        self.left = self.read = 0
        self.text, self.given = "", 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Returns the text that the token completes; empty within a character of several tokens."""
        self.tokens.append(token)
        known, whole = self._decode(self.left, self.read), self._decode(self.left, len(self.tokens))
        if len(whole) > len(known) and not whole.endswith("\ufffd"):  # else a character's last token is still to come
            self.left, self.read = self.read, len(self.tokens)
            self.text += whole[len(known) :]
        self.text, self.stopped = cut(self.text, self.stops)
        return self._give(len(self.text) if self.stopped else len(self.text) - self._undecided())

    def finish(self) -> str:
        """Returns the text that was held back."""
        if not self.stopped:
            self.text += self._decode(self.left, len(self.tokens))[len(self._decode(self.left, self.read)) :]
            self.text, self.stopped = cut(self.text, self.stops)
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        start, self.given = self.given, max(self.given, end)
        return self.text[start : self.given]

    def _undecided(self) -> int:
        """Returns the number of characters at the end that may begin a stop string."""
        lengths = (n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _decode(self, start: int, end: int) -> str:
        return self.processor.decode(self.tokens[start:end], skip_special_tokens=True) if end > start else ""


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Returns the text before the first stop string, and whether there is one."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
