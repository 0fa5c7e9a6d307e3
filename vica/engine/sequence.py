"""Follow one request through the engine: its state, its answer so far, and what it holds while it runs."""

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from ..data.processor import ViCAProcessor
from .image_memory import Entry
from .inputs import Prepared
from .kv import SharedPrefix
from .passes import RunningPrompt
from .request import Request, Result, Token
from .text import TextStream, cut


class State(Enum):
    """WAITING -> RUNNING -> DRAINING -> FINISHED. Short memory sends a running sequence back to WAITING; FINISHED may
    follow every state."""

    WAITING = auto()  # being prepared, or without room
    RUNNING = auto()  # has a batch slot, K/V indices and image entries
    DRAINING = auto()  # its last token is in flight; it has given everything back
    FINISHED = auto()  # has its result


@dataclass(eq=False)
class Sequence:
    """A request from its submission to its result."""

    request: Request
    prepared: "Future[Prepared]"
    seed: int
    processor: ViCAProcessor | None
    stream: TextStream | None  # None: no text is needed before the end
    sink: "deque[Outcome]"
    streaming: bool  # every token goes to the sink, not only the result
    state: State = State.WAITING
    is_prepared: bool = False  # remembers `prepared.done()`, which is slow to ask
    submitted: float = field(default_factory=time.perf_counter)
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    admitted: float | None = None
    first_token: float | None = None
    cancelled: bool = False  # together with its whole stream
    retried: bool = False  # after memory was too short for it alone
    launched: int = 0  # tokens that the device was told to compute, those before a preemption included
    max_tokens: int = 0
    # Held while RUNNING:
    prompt: RunningPrompt | None = None
    prefix: SharedPrefix | None = None
    computes_prefix: bool = False  # it is the first with this prefix, and the K/V are not computed yet
    own_kv: np.ndarray | None = None  # its K/V indices without those of the prefix
    entries: list[Entry] = field(default_factory=list)

    @property
    def running(self) -> RunningPrompt:
        """The prompt of a RUNNING sequence."""
        if self.prompt is None:
            raise RuntimeError("this sequence holds no batch slot")
        return self.prompt

    @property
    def text_length(self) -> int:
        """Text tokens that it holds once the device has done all that was launched."""
        assert self.prompt is not None
        return len(self.prompt.kv_index) - (self.max_tokens - self.launched)

    def finish(self, reason: str, last: Token | None = None, error: str | None = None) -> None:
        """Makes the result and sends it off, with the last token if there is one."""
        now = time.perf_counter()
        self.state = State.FINISHED
        result = Result(
            self.request.id,
            self._text(),
            list(self.tokens),
            reason,
            error,
            prompt_tokens=self.prompt_tokens,
            queued_s=(self.admitted or now) - self.submitted,
            first_token_s=None if self.first_token is None else self.first_token - self.submitted,
            total_s=now - self.submitted,
        )
        self.sink.append((self, last, result))

    def _text(self) -> str:
        if not self.tokens or self.processor is None:
            return ""
        text = self.processor.decode(self.tokens, skip_special_tokens=True)
        return cut(text, self.request.stops)[0].strip()


Outcome = tuple[Sequence, Token | None, Result | None]  # a token, a result, or the last token with the result
