"""What each decoder layer does with each group of tokens, as data.

A plan is a list with one LayerPlan a layer, and any mixture is legal: the flows in vica/model follow it and hold no
wiring of their own. A new method is a new plan, never a new model class.

    dense                 update in every layer
    ViCA                  read in the T2V layers, skip in the others
    ShortV                read in some layers, update in the others
    VTW                   update, and a drop that keeps nothing
    FastV, PyramidDrop    update, and drops that keep the visual tokens with the highest attention
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from ..utils.errors import ViCAError

VISUAL = ("update", "read", "skip")
RANKS = ("previous", "own")
ROUNDINGS: dict[str, Callable[[float], int]] = {"round": round, "down": math.floor}


@dataclass(frozen=True)
class Drop:
    """Visual tokens that leave for good before a layer.

    `keep` is a share of the visual tokens that a sequence's call brought, all its images together; earlier drops take
    from the same count. `rank` says which stay: those with the highest attention from the last prompt token, in the
    layer before ("previous") or in this layer on all tokens that are still there ("own"). None keeps all or nothing.
    `renumber` closes the gap in the positions; otherwise every token keeps its own.
    """

    keep: float
    rank: str | None = None
    rounding: str = "round"
    renumber: bool = False

    def count(self, first: int, present: int) -> int:
        """Returns how many of `present` visual tokens stay, of `first` that the call brought. The host knows all sizes
        before layer 0, so no drop waits for the device."""
        if self.rank is None:
            return present if self.keep else 0
        return min(present, ROUNDINGS[self.rounding](first * self.keep))


@dataclass(frozen=True)
class LayerPlan:
    """One layer.

    `visual`: "update" makes visual tokens hidden states like any other; "read" leaves them as they are and computes
    their keys and values; "skip" leaves them alone. `text_reads`: text attends to visual keys. `prefix_attends`: the
    tokens before the first image get an attention update (they always get their FFN update).
    """

    visual: str = "update"
    text_reads: bool = True
    prefix_attends: bool = True
    drop: Drop | None = None

    @property
    def updates(self) -> bool:
        return self.visual == "update"

    @property
    def reads(self) -> bool:
        """Whether text attends to visual tokens."""
        return self.text_reads and self.visual != "skip"

    @property
    def reads_frozen(self) -> bool:
        """Whether text attends to visual tokens that this layer does not update: the T2V layers of ViCA."""
        return self.text_reads and self.visual == "read"


def check_plan(plan: Sequence[LayerPlan], num_layers: int) -> None:
    """Raises ViCAError where a plan does not fit the model or cannot be followed."""
    if len(plan) != num_layers:
        raise ViCAError(f"the plan has {len(plan)} layers, the model {num_layers}")
    left = 1.0
    for i, layer in enumerate(plan):
        where = f"layer {i} of the plan"
        if layer.visual not in VISUAL:
            raise ViCAError(f"{where} has visual={layer.visual!r}; it must be one of {', '.join(VISUAL)}")
        if (drop := layer.drop) is None:
            continue
        if not 0 <= drop.keep <= left:
            raise ViCAError(f"{where} keeps {drop.keep} of the visual tokens; it must be a share from 0 to {left}")
        if drop.rounding not in ROUNDINGS:
            raise ViCAError(f"{where} has rounding={drop.rounding!r}; it must be one of {', '.join(ROUNDINGS)}")
        if drop.rank not in (None, *RANKS):
            raise ViCAError(f"{where} ranks by {drop.rank!r}; it must be one of {', '.join(RANKS)} or none")
        if drop.rank is None and drop.keep not in (0, left):
            raise ViCAError(f"{where} keeps {drop.keep} of the visual tokens without a rank that says which")
        ranking = layer if drop.rank == "own" else plan[i - 1] if drop.rank and i else None
        if drop.rank and (ranking is None or not ranking.reads):
            raise ViCAError(f"{where} ranks by attention that does not exist: text reads no visual tokens there")
        left = drop.keep


def is_uniform(plan: Sequence[LayerPlan]) -> bool:
    """Whether the visual tokens are the same in every layer: all updated and read, or all frozen, none dropped."""
    updates = {layer.updates for layer in plan}
    return len(updates) == 1 and all(layer.drop is None and (layer.reads or not layer.updates) for layer in plan)


def updates_visual(plan: Sequence[LayerPlan]) -> bool:
    """Whether any layer makes visual tokens hidden states. Where none does, they are K/V beside the text."""
    return any(layer.updates for layer in plan)


def drops_before(plan: Sequence[LayerPlan]) -> list[int]:
    """Returns each layer's segment: how many drops stand before it. Layers of a segment hold the same tokens."""
    segments, count = [], 0
    for layer in plan:
        count += layer.drop is not None
        segments.append(count)
    return segments


def plan_to_json(plan: Sequence[LayerPlan]) -> list[dict]:
    return [asdict(layer) for layer in plan]


def plan_from_json(layers: Sequence) -> list[LayerPlan]:
    """Returns the plan that a list of tables describes; LayerPlan objects stay as they are."""
    plan = []
    for i, layer in enumerate(layers):
        try:
            if isinstance(layer, Mapping):
                drop = layer.get("drop")
                layer = LayerPlan(**{**layer, "drop": Drop(**drop) if isinstance(drop, Mapping) else drop})
        except TypeError as error:
            raise ViCAError(f"layer {i} of the plan is {layer!r}: {error}") from error
        if not isinstance(layer, LayerPlan):
            raise ViCAError(f"layer {i} of the plan is {layer!r}; it must be a table of settings")
        plan.append(layer)
    return plan
