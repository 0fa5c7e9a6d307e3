"""Run the model's passes: pixels to features, features to frozen K/V, prompts to first tokens, tokens to next tokens.

The device holds each batch slot's last token, next position and number of text tokens, so a decode step needs nothing
from the host unless the batch has changed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..kernels.layer_torch import Shape, TorchOps
from ..kernels.transfer import integers_to_device, to_device
from ..kernels.work import Step, image_places
from ..model.prompt import VISUAL
from ..plan.layer import updates_visual
from ..plan.sizes import visual_tokens
from .decoder import Decoder
from .graphs import Graphs
from .kv import TextPool
from .passes import DecodeBatch, PrefillPass, RunningPrompt
from .sampling import sample
from .tower import CAPTURED_IMAGES, IMAGES, Tower

LONG_TEXT = 256  # text tokens from which on attention over a prompt's keys is split, where the batch is small
MAX_SPLITS = 8

Tensors = Mapping[str, torch.Tensor]
LogitsAndTokens = tuple[torch.Tensor, torch.Tensor]


class Runner:
    """One model on one device, with room for `max_batch` running prompts and the K/V of `kv_tokens` text tokens."""

    def __init__(self, model: Any, max_batch: int, kv_tokens: int, cuda_graphs: bool) -> None:
        self.model, config = model, model.config
        text = config.text_config
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.images_are_kv = not updates_visual(config.plan)
        self.freezes_prefix = any(not p.prefix_attends for p in config.plan)
        self.width = text.max_position_embeddings
        cos, sin = model.model.rotary(torch.arange(self.width, device=self.device), torch.float32)
        self.ops = make_ops(Shape.of(text), cos, sin)
        heads, dim = text.num_key_value_heads, text.head_dim
        self.pool = TextPool(len(config.plan), kv_tokens, heads, dim, self.dtype, self.device)
        self.decoder = Decoder(model.model.layers, config.plan, self.ops, self.pool.kv)
        self.graphs = Graphs(self.device, cuda_graphs and self.device.type == "cuda")
        self.tower = Tower(model, self.graphs) if hasattr(model.model, "vision_tower") else None
        self.visual_tokens = visual_tokens(config)
        self.captured_features: dict[int, torch.Tensor] = {}  # inputs of captured passes, by number of images
        batch_slots = max_batch + 1
        self.kv_table = torch.zeros(batch_slots, self.width, dtype=torch.int64, device=self.device)
        state = torch.zeros(3, batch_slots, dtype=torch.int64, device=self.device)
        self.last_ids, self.next_position, self.length = state
        cuda = self.device.type == "cuda"
        self.blocks_wanted = torch.cuda.get_device_properties(self.device).multi_processor_count if cuda else 1

    # --- images ---

    def image_bytes(self, tokens: int) -> int:
        """Returns what a running request holds of an image of so many tokens: K/V, or in dense features."""
        text, layers = self.model.config.text_config, len(self.decoder.image_layers)
        kv = 2 * text.num_key_value_heads * text.head_dim * layers
        values_each: int = kv if self.images_are_kv else text.hidden_size
        return tokens * values_each * self.dtype.itemsize

    def encode(self, pixels: np.ndarray) -> list[torch.Tensor]:
        """Returns the features of each image of [n, 3, H, W], [tokens, width]."""
        if self.tower is None:
            raise RuntimeError("this model has no vision tower")
        return self.tower(to_device(pixels, self.device))

    def image_kv(self, features: Sequence[torch.Tensor], starts: Sequence[int]) -> list[torch.Tensor]:
        """Returns the frozen K/V of images whose first tokens stand at the positions `starts`."""
        images = self.decoder.empty_images([len(x) for x in features])
        for i in range(0, len(images), IMAGES):
            self._fill_images(images[i : i + IMAGES], features[i : i + IMAGES], starts[i : i + IMAGES])
        return images

    def _fill_images(self, images: list[torch.Tensor], features: Sequence[torch.Tensor], starts: Sequence[int]) -> None:
        arrays, rows, capacity = image_places(images, starts), torch.cat(list(features)), None
        alike = all(len(x) == self.visual_tokens for x in features)
        if self.graphs.enabled and alike and len(images) <= CAPTURED_IMAGES[-1]:
            capacity = {name: len(x) for name, x in arrays.items()}
            rows = self.captured_features.setdefault(len(images), torch.empty_like(rows)).copy_(rows)
        self.graphs.run(
            ("images", len(images)), arrays, capacity, lambda place: self.decoder.fill_images(rows, place, images)
        )

    # --- prompts ---

    def prefill(self, prompts: list[RunningPrompt]) -> torch.Tensor:
        """Computes the prompts in one pass and returns the first token of each."""
        work = PrefillPass.of(
            prompts,
            [] if self.images_are_kv else [x for prompt in prompts for x in prompt.images],
            freezes_prefix=self.freezes_prefix,
            reads_images=bool(self.decoder.image_layers),
            items_wanted=self.items_wanted,
        )
        self._write_kv_table(prompts)
        key = ("prefill", work.size, work.block, work.image_block)
        logits, tokens = self.graphs.run(key, work.arrays, work.capacity, lambda t: self._prefill(work, t))
        return self._choose(logits, tokens, prompts)

    def _prefill(self, work: PrefillPass, t: Tensors) -> LogitsAndTokens:
        hidden = self.model.model.embed_tokens(t["ids"].clamp(min=0))
        if work.features:
            hidden[t["ids"] == VISUAL] = torch.cat(work.features).to(hidden)
        step = Step(
            t["positions"],
            t["kv_index"],
            t["limit"],
            t["tiles"],
            self.kv_table,
            work.block,
            frozen_rows=work.frozen_rows,
            frozen_tiles=work.frozen_tiles,
            images=None if work.images is None else work.images.on_device(t),
            last=t["last"],
        )
        logits, tokens = self._logits(self.decoder.run(hidden, step))
        batch_slots = t["batch_slots"]
        self.last_ids[batch_slots], self.next_position[batch_slots] = tokens, t["next_position"]
        self.length[batch_slots] = t["length"]
        return logits, tokens

    def _write_kv_table(self, prompts: list[RunningPrompt]) -> None:
        table = np.zeros((len(prompts), max(len(prompt.kv_index) for prompt in prompts)), np.int64)
        for i, prompt in enumerate(prompts):
            table[i, : len(prompt.kv_index)] = prompt.kv_index
        batch_slots = np.array([prompt.batch_slot for prompt in prompts])
        t = integers_to_device(dict(table=table, batch_slots=batch_slots), self.device)
        self.kv_table[t["batch_slots"], : table.shape[1]] = t["table"]

    # --- next tokens ---

    def batch(self, prompts: list[RunningPrompt]) -> DecodeBatch:
        """Returns the prompts as a batch that `decode` takes, until one leaves or enters."""
        return DecodeBatch.of(
            prompts,
            capture=self.graphs.enabled,
            reads_images=bool(self.decoder.image_layers),
            items_wanted=self.items_wanted,
        )

    def decode(self, batch: DecodeBatch, longest: int) -> torch.Tensor:
        """Returns the next token of each prompt. `longest`: most text tokens that one of them holds."""
        wanted = self.blocks_wanted // (batch.size * self.ops.shape.heads)
        splits = min(MAX_SPLITS, max(1, wanted)) if longest >= LONG_TEXT else 1
        key = ("decode", batch.size, splits, batch.image_block)
        logits, tokens = self.graphs.run(key, batch.arrays, batch.capacity, lambda t: self._decode(batch, splits, t))
        return self._choose(logits, tokens, batch.prompts)

    def _decode(self, batch: DecodeBatch, splits: int, t: Tensors) -> LogitsAndTokens:
        batch_slots = t["batch_slots"]
        # Batch slot 0, the padding's, counts on with every captured pass: keep it inside the tables.
        positions, limit = (x[batch_slots].clamp(max=self.width - 1) for x in (self.next_position, self.length))
        kv_index = self.kv_table[batch_slots, limit]
        images = None if batch.images is None else batch.images.on_device(t)
        step = Step(positions, kv_index, limit, t["tiles"], self.kv_table, 1, splits, images=images)
        hidden = self.model.model.embed_tokens(self.last_ids[batch_slots])
        logits, tokens = self._logits(self.decoder.run(hidden, step))
        self.last_ids[batch_slots] = tokens
        self.next_position[batch_slots], self.length[batch_slots] = positions + 1, limit + 1
        return logits, tokens

    # --- prompts and next tokens ---

    @property
    def items_wanted(self) -> int:
        """Items of attention over images that fill the device; each runs once for every head."""
        return self.blocks_wanted // self.ops.shape.heads

    def _logits(self, hidden: torch.Tensor) -> LogitsAndTokens:
        logits = self.ops.norm_linear(hidden, self.model.model.norm.weight, self.model.lm_head.weight)
        return logits, logits.argmax(-1)

    def _choose(self, logits: torch.Tensor, tokens: torch.Tensor, prompts: list[RunningPrompt]) -> torch.Tensor:
        """Returns the likeliest tokens, with drawn ones in place for the prompts that sample."""
        tokens = tokens[: len(prompts)]
        sampling = {row: prompt for row, prompt in enumerate(prompts) if prompt.sampling is not None}
        if not sampling:
            return tokens
        settings = [prompt.sampling for prompt in sampling.values() if prompt.sampling is not None]
        batch_slots, seeds = [prompt.batch_slot for prompt in sampling.values()], [seed for *_, seed in settings]
        t = integers_to_device(dict(rows=[*sampling], batch_slots=batch_slots, seed=seeds), self.device)
        temperature, top_k, top_p = torch.tensor([x[:3] for x in settings]).to(self.device).unbind(1)
        drawn = sample(logits[t["rows"]], temperature, top_k, top_p, t["seed"], self.next_position[t["batch_slots"]])
        self.last_ids[t["batch_slots"]] = drawn
        return tokens.index_copy(0, t["rows"], drawn)


def make_ops(shape: Shape, cos: torch.Tensor, sin: torch.Tensor) -> TorchOps:
    """Returns the layer operations for the device that the rotary tables are on."""
    if cos.device.type != "cuda":
        return TorchOps(shape, cos, sin)
    from ..kernels.layer_triton import CudaOps

    return CudaOps(shape, cos, sin)
