"""Launch passes and read their tokens.

The device is told to compute a step before the host has read the step before it, so both work at the same time. A pass
is *in flight* from its launch until its tokens are read.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from .admission import Admission
from .budget import Limits, out_of_memory
from .image_memory import FEATURES, Entry, ImageMemory
from .image_store import ImageContent
from .passes import DecodeBatch
from .request import Token
from .runner import Runner
from .sequence import Sequence, State


class Pass(NamedTuple):
    """A launched pass: `tokens` are there once `copied` has happened, one for each sequence."""

    tokens: torch.Tensor
    copied: "torch.cuda.Event | None"  # None: on a CPU the tokens are there already
    sequences: list[Sequence]


class Flight:
    """Owns the running and draining sequences, and the passes in flight."""

    def __init__(
        self, runner: Runner, memory: ImageMemory, admission: Admission, limits: Limits, ends: set[int]
    ) -> None:
        self.runner, self.memory, self.admission, self.limits, self.ends = runner, memory, admission, limits, ends
        self.active: list[Sequence] = []  # RUNNING
        self.draining: set[Sequence] = set()  # DRAINING
        self.passes: deque[Pass] = deque()  # in flight
        self.batch: DecodeBatch | None = None  # of `active`; None where that has changed

    # --- launch ---

    def decode(self) -> bool:
        """Launches the next token of every running sequence. Returns False if memory was too short."""
        running = list(self.active)
        batch = self.batch = self.batch or self.runner.batch([s.running for s in running])
        longest = max(s.text_length for s in running)
        tokens = unless_out_of_memory(lambda: self.runner.decode(batch, longest))
        if tokens is None:
            return False
        for sequence in running:
            sequence.retried = False
        self._launched(tokens, running)
        return True

    def prefill(self, entering: list[Sequence]) -> torch.Tensor | None:
        """Computes the entering sequences' images and prompts. Returns their first tokens, or None if memory was too
        short."""
        return unless_out_of_memory(lambda: self._first_tokens(entering))

    def enter(self, entered: list[Sequence], tokens: torch.Tensor) -> None:
        """Lets sequences whose prefill was launched run."""
        self.admission.confirm(entered)
        self.active += entered
        self.batch = None
        self._launched(tokens, entered)

    def _launched(self, tokens: torch.Tensor, sequences: list[Sequence]) -> None:
        """Counts a launched pass. A sequence whose last token is in flight has no more use for its batch slot, K/V and
        images: whatever others do with them, the device does later."""
        self.limits.record_success()
        for sequence in sequences:
            sequence.launched += 1
            if sequence.launched == sequence.max_tokens:
                self.release(sequence)
                self.draining.add(sequence)
                sequence.state = State.DRAINING
        self.active = [s for s in self.active if s.state is State.RUNNING]
        copied = None
        if tokens.device.type == "cuda":
            tokens = tokens.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.passes.append(Pass(tokens, copied, sequences))

    # --- images ---

    def _first_tokens(self, entering: list[Sequence]) -> torch.Tensor:
        self._compute_images(entering)
        return self.runner.prefill([s.running for s in entering])

    def _compute_images(self, entering: list[Sequence]) -> None:
        """Fills the new entries of the image memory, pixels to features and features to K/V, and gives the prompts
        their images."""
        new: dict[Entry, ImageContent] = {}
        for sequence in entering:
            for image, entry in zip(sequence.prepared.result().images, sequence.entries):
                if entry.tensor is None:
                    new.setdefault(entry, image)
        features = self._features({image.key: image for image in new.values()})
        tensors = [features[entry.key] for entry in new]
        if self.runner.images_are_kv:
            tensors = self.runner.image_kv(tensors, [entry.start for entry in new])
        for entry, tensor in zip(new, tensors):
            entry.tensor = tensor
        for sequence in entering:
            sequence.running.images = [entry.tensor for entry in sequence.entries if entry.tensor is not None]
            for image in sequence.prepared.result().images:
                image.loaded.clear()  # pixels are large, and not needed any more
        self.memory.misses += len(new)
        self.memory.hits += sum(len(s.entries) for s in entering) - len(new)

    def _features(self, images: dict[str, ImageContent]) -> dict[str, torch.Tensor]:
        """Returns the features of each image by its key: those that were given or stored, else the tower's."""
        found: dict[str, torch.Tensor] = {}
        pixels: dict[str, np.ndarray] = {}
        for key, image in images.items():
            if image.loaded.features is not None:
                found[key] = image.loaded.features.to(self.runner.device, self.runner.dtype)
            elif image.loaded.pixels is not None:
                pixels[key] = image.loaded.pixels
        if pixels:
            found |= dict(zip(pixels, self.runner.encode(np.stack(list(pixels.values())))))
        if self.runner.images_are_kv:
            for key, features in found.items():
                self.memory.offer(key, FEATURES, features)
        return found

    # --- read ---

    def harvest(self) -> None:
        """Waits for the oldest pass in flight and hands its tokens on."""
        tokens, copied, sequences = self.passes.popleft()
        if copied is not None:
            copied.synchronize()
        now = time.perf_counter()
        for sequence, token in zip(sequences, tokens.tolist()):
            if sequence.state is not State.FINISHED:  # it may have ended while the device was a step ahead
                sequence.first_token = sequence.first_token or now
                self._accept(sequence, token)

    def _accept(self, sequence: Sequence, token: int) -> None:
        """Adds a token to the answer, and ends it where the token does."""
        stream = sequence.stream
        sequence.tokens.append(token)
        ended = token in self.ends and not sequence.request.ignore_eos
        piece = "" if stream is None else stream.push(token)
        stopped = stream is not None and stream.stopped
        full = len(sequence.tokens) >= sequence.max_tokens
        if stream is not None and (ended or full):
            piece += stream.finish()
        if ended or stopped or full:
            self.finish(sequence, "stop" if ended or stopped else "length", Token(token, piece))
        elif sequence.streaming:
            sequence.sink.append((sequence, Token(token, piece), None))

    # --- leave ---

    def finish(self, sequence: Sequence, reason: str, last: Token | None = None) -> None:
        """Ends a running or draining sequence."""
        if sequence.state is State.RUNNING:
            self.active.remove(sequence)
            self.release(sequence)
        elif sequence.state is State.DRAINING:
            self.draining.remove(sequence)
        sequence.finish(reason, last)

    def release(self, sequence: Sequence) -> None:
        """Takes everything back that the running sequence holds."""
        self.admission.release(sequence)
        self.batch = None


def unless_out_of_memory(work: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """Returns None if memory is too short, and then leaves nothing behind: while an error is being handled, it holds
    the tensors of the pass that failed."""
    try:
        return work()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
