"""Runs the engine's passes one by one, as its scheduler does for requests that all come at once."""

import numpy as np
import torch

from ..engine import Engine, Request
from ..engine.passes import DecodeBatch, RunningPrompt
from ..model.prompt import PromptLayout, lay_out
from ..plan.layer import updates_visual
from ..utils.errors import ViCAError
from .inputs import Prompts


class Drive:
    """An engine's passes on prompts. All prompts of one Drive share lanes and slots: use one list at a time, first for
    prefill, then for decode."""

    def __init__(self, engine: Engine):
        self.engine, self.runner = engine, engine.runner
        self.slots = np.zeros(0, np.int64)

    def admit(self, prompts: Prompts, prefix_kept: bool) -> list[RunningPrompt]:
        """Returns the prompts with room for their answers. A kept prefix is computed at once."""
        layouts = [self._layout(ids, prompts.shape.visual) for ids in prompts.ids]
        prefix, own = layouts[0].prefix, len(layouts[0]) + prompts.shape.answer - 1
        slots = self._take(prefix + own * len(layouts))
        kept, rest = slots[:prefix], slots[prefix:].reshape(len(layouts), own)
        if not prefix_kept:
            return [RunningPrompt(layout, lane, mine) for lane, (layout, mine) in enumerate(zip(layouts, rest), 1)]
        first = RunningPrompt(layouts[0], 1, np.concatenate([kept, rest[0]]))
        self.first_tokens([first], prompts.features[:1])
        return [
            RunningPrompt(layout, lane, np.concatenate([kept, mine[prefix:]]), shared=prefix)
            for lane, (layout, mine) in enumerate(zip(layouts, rest), 1)
        ]

    def clear(self) -> None:
        """Returns the slots to the engine, for its own requests."""
        self.runner.pool.give(self.slots)
        self.slots = self.slots[:0]

    @torch.inference_mode()
    def give_images(self, rows: list[RunningPrompt], features: list[torch.Tensor]) -> None:
        """Gives each prompt its image in the form that its pass takes: frozen K/V, or features that are hidden states
        themselves."""
        if self.runner.images_are_kv:
            features = self.runner.image_kv(features, [row.layout.images[0].start for row in rows])
        for row, image in zip(rows, features):
            row.images = [image]

    @torch.inference_mode()
    def prefill(self, rows: list[RunningPrompt]) -> torch.Tensor:
        return self.runner.prefill(rows)

    def first_tokens(self, rows: list[RunningPrompt], features: list[torch.Tensor]) -> torch.Tensor:
        self.give_images(rows, features)
        return self.prefill(rows)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return self.runner.tower(pixels)

    @torch.inference_mode()
    def start_decode(self, rows: list[RunningPrompt], features: list[torch.Tensor]) -> DecodeBatch:
        self.first_tokens(rows, features)
        return self.runner.batch(rows)

    @torch.inference_mode()
    def decode(self, batch: DecodeBatch, steps: int) -> torch.Tensor:
        longest = max(len(row.layout) for row in batch.prompts)
        for step in range(steps):
            tokens = self.runner.decode(batch, longest + step)
        return tokens

    def _layout(self, ids: list[int], visual: int) -> PromptLayout:
        config = self.engine.config
        vocabulary = config.text_config.vocab_size
        return lay_out(ids, [visual], config.image_token_index, vocabulary, updates_visual(config.plan))

    def _take(self, count: int) -> np.ndarray:
        pool, more = self.runner.pool, count - len(self.slots)
        if more > 0:
            if not pool.can_take(more):
                raise torch.OutOfMemoryError(f"{count} rows of text K/V wanted, the engine has {pool.size}")
            self.slots = np.concatenate([self.slots, pool.take(more)])
        return self.slots[:count]


def answer_all(engine: Engine, requests: list[Request]) -> None:
    """Answers requests as users do. A failed request is an error: it would only make the engine look faster."""
    results = engine.generate(requests)
    if failed := [result.error for result in results if result.error]:
        raise ViCAError(f"{len(failed)} of {len(results)} requests failed: {failed[0]}")
