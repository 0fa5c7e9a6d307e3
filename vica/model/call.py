"""One pass through the layers: what a flow is made from, what it must do, and the loop over blocks.

A block owns weights; a flow decides which tokens meet them. flow_mask.py is the slow and obvious one that defines the
meaning, flow_accel.py the fast one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from ..kernels.attention import Kernel
from ..kernels.pointwise import Rope
from ..kernels.transfer import to_device
from ..plan.layer import LayerPlan
from .cache import ViCACache
from .layout import Tokens
from .scores import Tap

if TYPE_CHECKING:
    from .backbone_llama import Block

Place = TypeVar("Place")


@dataclass(frozen=True)
class Call:
    """Everything a flow is made from: the plan, the tokens of this call, and where and how to compute."""

    plan: list[LayerPlan]
    tokens: Tokens
    cache: ViCACache | None
    rotary: Callable[[torch.Tensor, torch.dtype], Rope]
    kernel: Kernel
    device: torch.device
    taps: Sequence[Tap] = ()

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return to_device(array, self.device)

    @property
    def fresh(self) -> bool:
        """Whether no earlier call left keys behind."""
        return self.cache is None or self.cache.get_seq_length() == 0

    @property
    def closed_gaps(self) -> np.ndarray:
        """Positions that renumbering drops of earlier calls took, [segments, B]."""
        if self.cache is not None:
            return self.cache.closed_gaps
        return np.zeros((1 + sum(p.drop is not None for p in self.plan), self.tokens.batch), np.int64)

    @property
    def start(self) -> np.ndarray:
        """The next position of each sequence before this call, [B], nothing renumbered."""
        return self.cache.next_pos if self.cache is not None else np.zeros(self.tokens.batch, np.int64)

    def ranks_by(self, layer: int) -> bool:
        """Returns whether the drop before the next layer ranks by this layer's attention."""
        following = self.plan[layer + 1].drop if layer + 1 < len(self.plan) else None
        return following is not None and following.rank == "previous"

    def watchers(self, layer: int) -> list[Tap]:
        return [tap for tap in self.taps if tap.wants(layer)]


@dataclass(frozen=True)
class Packs(Generic[Place]):
    """The tokens between two layers.

    `x` holds the hidden states; `visual` the visual tokens that are no hidden states there, None if there are none.
    `place` says where they stand: the flow's own business.
    """

    x: torch.Tensor
    visual: torch.Tensor | None
    place: Place


KeysValues = tuple[torch.Tensor, torch.Tensor]
# Runs a function under gradient checkpointing, or as it is.
Run = Callable[..., Any]


class Flow(Protocol[Place]):
    """How the tokens of one call pass through the layers.

    A block hands itself and its tensors to `layer` inside its own forward, because a drop may use the block's weights,
    and ZeRO-3 and FSDP gather these for the forward only.
    """

    gaps: list[np.ndarray]  # positions that renumbering drops of this call took from each sequence, by segment

    def start(self, text: torch.Tensor, visual: torch.Tensor) -> Packs[Place]:
        """Returns the packs before layer 0, from embeddings of text and visual tokens in reading order."""

    def needs_visual(self, block: "Block", packs: Packs[Place]) -> bool:
        """Returns whether the layer uses `packs.visual`. ZeRO-3 frees a block's weights once gradients for all its
        inputs have arrived, and an unused input never gets one: so a block is given only tensors that it uses."""

    def layer(
        self, block: "Block", x: torch.Tensor, visual: torch.Tensor | None, place: Place, run: Run
    ) -> tuple[torch.Tensor, torch.Tensor | None, Place]:
        """Returns (x, visual, place) after the layer; visual is None where it did not change. `run(function, *args)`
        is for the part that gradient checkpointing computes twice."""

    def text(self, packs: Packs[Place]) -> torch.Tensor:
        """Returns the text tokens, [number of text tokens, width], in reading order."""


def run_layers(
    layers: Iterable[Any], flow: Flow[Any], text: torch.Tensor, visual: torch.Tensor, states: list | None = None
) -> torch.Tensor:
    """Returns the text tokens after the last layer, in reading order. `states` collects them before each layer."""
    packs = flow.start(text, visual)
    for block in layers:
        if states is not None:
            states.append(flow.text(packs))
        given = packs.visual if flow.needs_visual(block, packs) else None
        x, visual_after, place = block(packs.x, given, packs.place, flow)
        packs = Packs(x, packs.visual if visual_after is None else visual_after, place)
    return flow.text(packs)


def among_ranks() -> bool:
    """Returns whether this is one process of several. Ranks that share weights in pieces (ZeRO-3, FSDP) must call
    every module equally often in training, even on empty input, or their all-gathers deadlock."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def plain_run(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
