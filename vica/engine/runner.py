"""The model's passes: pixels to features, features to frozen K/V, prompts to first tokens, tokens to next tokens.

A *lane* is a place in the batch. Its last token, position and number of rows live on the device, so that a decode step
needs nothing from the host unless the batch has changed. Lane 0 belongs to the padding rows of captured passes, and
slot 0 takes their K/V.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from ..kernels.layer_torch import Shape, TorchOps
from ..kernels.work import Step, block_of, cut_tiles, image_arrays, image_places, image_work, to_device
from ..plan.sizes import visual_tokens
from .decoder import Decoder
from .graphs import Graphs
from .kv import TextPool
from .layout import VISUAL, Layout
from .sampling import sample
from .tower import CAPTURED_IMAGES, IMAGES, Tower

CAPTURED_ROWS = (16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # prefills up to here are captured
LONG_TEXT = 256  # text keys from which on a row's attention is cut into parts, where the batch is small


@dataclass(eq=False)
class Row:
    """A prompt in a lane: what the passes need to know of it."""

    layout: Layout
    lane: int
    slots: np.ndarray  # of its rows, those to come included
    held: int = 0  # leading rows whose K/V other rows have made, or make in the same pass
    images: list[torch.Tensor] = field(default_factory=list)  # K/V of each; dense: features of each, rows themselves
    sampling: tuple | None = None  # temperature, top_k, top_p, seed; None: greedy


class Runner:
    def __init__(self, model, max_batch: int, slots: int, cuda_graphs: bool):
        self.model, config = model, model.config
        text, self.device, self.dtype = config.text_config, model.device, model.dtype
        self.images_are_kv = not config.plan[0].updates
        self.freezes_prefix = any(not p.prefix_attends for p in config.plan)
        self.width = text.max_position_embeddings
        rope = model.model.rotary(torch.arange(self.width, device=self.device), torch.float32)
        self.ops = make_ops(Shape.of(text), *rope, self.dtype)
        self.pool = TextPool(len(config.plan), slots, text.num_key_value_heads, text.head_dim, self.dtype, self.device)
        self.decoder = Decoder(model.model.layers, config.plan, self.ops, self.pool.kv)
        self.graphs = Graphs(self.device, cuda_graphs and self.device.type == "cuda")
        self.tower = Tower(model, self.graphs) if hasattr(model.model, "vision_tower") else None
        self.visual_tokens, self.image_rows = visual_tokens(config), {}  # features of captured passes, by their number
        lanes = max_batch + 1
        self.table = torch.zeros(lanes, self.width, dtype=torch.int64, device=self.device)
        self.last_ids, self.next_pos, self.length = torch.zeros(3, lanes, dtype=torch.int64, device=self.device)
        cuda = self.device.type == "cuda"
        self.blocks_wanted = torch.cuda.get_device_properties(self.device).multi_processor_count if cuda else 1

    # --- images ---

    def image_bytes(self, tokens: int) -> int:
        """Of what a running request holds of an image."""
        text, layers = self.model.config.text_config, len(self.decoder.image_layers)
        kv = 2 * text.num_key_value_heads * text.head_dim * layers
        return tokens * self.dtype.itemsize * (kv if self.images_are_kv else text.hidden_size)

    def encode(self, pixels: np.ndarray) -> list[torch.Tensor]:
        """[n, 3, H, W] to the features of each image."""
        pixels = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        return self.tower(pixels)

    def image_kv(self, features: list[torch.Tensor], starts: list[int]) -> list[torch.Tensor]:
        """Frozen K/V of images whose first tokens stand at `starts`."""
        images = self.decoder.empty_images([len(x) for x in features])
        for i in range(0, len(images), IMAGES):
            self._fill_images(images[i : i + IMAGES], features[i : i + IMAGES], starts[i : i + IMAGES])
        return images

    def _fill_images(self, images, features, starts) -> None:
        arrays, rows, capacity = image_places(images, starts), torch.cat(features), None
        alike = all(len(x) == self.visual_tokens for x in features)
        if self.graphs.enabled and alike and len(images) <= CAPTURED_IMAGES[-1]:
            capacity = {name: len(x) for name, x in arrays.items()}
            rows = self.image_rows.setdefault(len(images), torch.empty_like(rows)).copy_(rows)
        self.graphs.run(
            ("images", len(images)), arrays, capacity, lambda place: self.decoder.fill_images(rows, place, images)
        )

    # --- prompts ---

    def prefill(self, rows: list[Row]) -> torch.Tensor:
        """The first token of each."""
        apart = [row for row in rows if self._prefix_apart(row)]
        pieces = [(row, 0, row.layout.prefix) for row in apart]
        pieces += [(row, row.layout.prefix if row in apart else row.held, len(row.layout)) for row in rows]
        firsts = np.cumsum([0, *(end - start for _, start, end in pieces)])
        tiles = [t for (row, a, b), first in zip(pieces, firsts) for t in cut_tiles(first, b - a, row.lane)]
        seen = [
            (kv, np.arange(first + image.first_row - start, first + end - start))
            for (row, start, end), first in zip(pieces[len(apart) :], firsts[len(apart) :])
            for image, kv in zip(row.layout.images, row.images)
            if self.decoder.image_layers
        ]
        arrays = dict(
            ids=np.concatenate([row.layout.ids[a:b] for row, a, b in pieces]),
            pos=np.concatenate([row.layout.pos[a:b] for row, a, b in pieces]),
            slot=np.concatenate([row.slots[a:b] for row, a, b in pieces]),
            limit=np.concatenate([np.arange(a, b) for _, a, b in pieces]),
            tiles=np.array(tiles),
            last=firsts[len(apart) + 1 :] - 1,
            lanes=np.array([row.lane for row in rows]),
            next_pos=np.array([row.layout.total for row in rows]),
            length=np.array([len(row.layout) for row in rows]),
        )
        frozen = dict(
            frozen_rows=int(firsts[len(apart)]),
            frozen_tiles=sum(len(cut_tiles(0, b, 0)) for _, _, b in pieces[: len(apart)]),
        )
        features = [] if self.images_are_kv else [x for row in rows for x in row.images]
        self._write_table(rows)
        return self._choose(*self._prefill_pass(arrays, seen, features, **frozen), rows)

    def _prefix_apart(self, row: Row) -> bool:
        """Rows that some layer gives no attention update go first, so that the others are a slice."""
        return self.freezes_prefix and bool(row.layout.images) and row.held == 0 and row.layout.prefix > 0

    def _prefill_pass(self, arrays, seen, features, **frozen):
        count, capacity = len(arrays["ids"]), None
        size = next((n for n in CAPTURED_ROWS if n >= count), None)
        if size is not None and not features and not frozen["frozen_rows"]:
            capacity = dict(ids=size, pos=size, slot=size, limit=size, tiles=size // 8 + 2)
            capacity |= {name: size // 16 + 2 for name in ("last", "lanes", "next_pos", "length")}
        images, kvs = image_arrays(seen, count, self.blocks_wanted // self.ops.shape.heads, capacity)
        blocks = block_of(arrays["tiles"][:, 1]), block_of(images["items"][:, 5]) if images else 0

        def work(t):
            hidden = self.model.model.embed_tokens(t["ids"].clamp(min=0))
            if features:
                hidden[t["ids"] == VISUAL] = torch.cat(features).to(hidden)
            work = image_work(t, kvs, blocks[1])
            step = Step(
                t["pos"],
                t["slot"],
                t["limit"],
                t["tiles"],
                self.table,
                blocks[0],
                images=work,
                last=t["last"],
                **frozen,
            )
            logits, tokens = self._logits(self.decoder.run(hidden, step))
            self.last_ids[t["lanes"]], self.next_pos[t["lanes"]] = tokens, t["next_pos"]
            self.length[t["lanes"]] = t["length"]
            return logits, tokens

        return self.graphs.run(("prefill", size, *blocks), arrays | images, capacity, work)

    def _write_table(self, rows: list[Row]) -> None:
        table = np.zeros((len(rows), max(len(row.slots) for row in rows)), np.int64)
        for i, row in enumerate(rows):
            table[i, : len(row.slots)] = row.slots
        t = to_device(dict(table=table, lanes=np.array([row.lane for row in rows])), self.device)
        self.table[t["lanes"], : table.shape[1]] = t["table"]

    # --- next tokens ---

    def batch(self, rows: list[Row]) -> "Batch":
        """Rows that decode together until one leaves or enters."""
        lanes = np.array([row.lane for row in rows])
        tiles = np.stack([np.arange(len(rows)), np.ones(len(rows), np.int64), lanes], 1)
        capacity = None
        if self.graphs.enabled:
            size = bucket(len(rows))
            capacity = dict(lanes=size, tiles=size)
        seen = [(kv, np.array([i])) for i, row in enumerate(rows) for kv in row.images if self.decoder.image_layers]
        images, kvs = image_arrays(seen, len(rows), self.blocks_wanted // self.ops.shape.heads, capacity)
        return Batch(rows, dict(lanes=lanes, tiles=tiles) | images, kvs, capacity)

    def decode(self, batch: "Batch", longest: int) -> torch.Tensor:
        """The next token of each row; `longest`: text rows that one holds at most."""
        size = batch.capacity["lanes"] if batch.capacity else len(batch.rows)
        wanted = self.blocks_wanted // (size * self.ops.shape.heads)
        splits = min(8, max(1, wanted)) if longest >= LONG_TEXT else 1
        block = block_of(batch.arrays["items"][:, 5]) if "items" in batch.arrays else 0

        def work(t):
            lanes = t["lanes"]
            pos, limit = (x[lanes].clamp(max=self.width - 1) for x in (self.next_pos, self.length))
            images = image_work(t, batch.kvs, block)
            step = Step(pos, self.table[lanes, limit], limit, t["tiles"], self.table, 1, splits, images=images)
            hidden = self.model.model.embed_tokens(self.last_ids[lanes])
            logits, tokens = self._logits(self.decoder.run(hidden, step))
            self.last_ids[lanes], self.next_pos[lanes], self.length[lanes] = tokens, pos + 1, limit + 1
            return logits, tokens

        key = ("decode", size, splits, block)
        return self._choose(*self.graphs.run(key, batch.arrays, batch.capacity, work), batch.rows)

    # --- both ---

    def _logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.ops.norm_linear(hidden, self.model.model.norm.weight, self.model.lm_head.weight)
        return logits, logits.argmax(-1)

    def _choose(self, logits, tokens, rows: list[Row]) -> torch.Tensor:
        """The likeliest tokens, but for the rows that sample."""
        tokens, drawing = tokens[: len(rows)], [i for i, row in enumerate(rows) if row.sampling is not None]
        if not drawing:
            return tokens
        seeds = [rows[i].sampling[3] for i in drawing]
        t = to_device(dict(rows=drawing, lanes=[rows[i].lane for i in drawing], seed=seeds), self.device)
        settings = torch.tensor([rows[i].sampling[:3] for i in drawing]).to(self.device)
        drawn = sample(logits[t["rows"]], *settings.unbind(1), t["seed"], self.next_pos[t["lanes"]])
        self.last_ids[t["lanes"]] = drawn
        return tokens.index_copy(0, t["rows"], drawn)


@dataclass(eq=False)
class Batch:
    rows: list[Row]
    arrays: dict[str, np.ndarray]
    kvs: list[torch.Tensor]
    capacity: dict[str, int] | None


def bucket(rows: int) -> int:
    """Sizes that decode steps are captured in: few enough to capture, close enough to waste little."""
    step = 1 if rows <= 4 else 4 if rows <= 16 else 8 if rows <= 32 else 16 if rows <= 128 else 32
    return -(-rows // step) * step


def make_ops(shape: Shape, cos, sin, dtype) -> TorchOps:
    if cos.device.type != "cuda":
        return TorchOps(shape, cos, sin)
    from ..kernels.layer_triton import CudaOps

    return CudaOps(shape, cos, sin)
