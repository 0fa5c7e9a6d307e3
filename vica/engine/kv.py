"""K/V of text rows: one block of slots that is handed out by the row, and the prefixes that stay in it."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

TRASH = 0  # the slot that padding rows of a captured graph write to


@dataclass(eq=False)
class Prefix:
    """The first rows of prompts that begin alike: computed once, then read by all of them."""

    slots: np.ndarray
    users: int = 0


class TextPool:
    def __init__(self, layers: int, slots: int, kv_heads: int, head_dim: int, dtype, device: torch.device):
        make = torch.zeros if device.type == "cpu" else torch.empty  # a CPU's zeros take no memory until they are used
        self.kv = make(layers, slots + 1, 2, kv_heads, head_dim, dtype=dtype, device=device)
        self.kv[:, TRASH] = 0
        self.slots = slots
        self._free = np.arange(slots, 0, -1)
        self._left = slots
        self.prefixes: OrderedDict[tuple, Prefix] = OrderedDict()  # least recently used first

    @property
    def free(self) -> int:
        return self._left

    def can_take(self, slots: int) -> bool:
        return slots <= self._left or slots <= self._left + sum(
            len(p.slots) for p in self.prefixes.values() if not p.users
        )

    def take(self, slots: int) -> np.ndarray:
        """Call only after `can_take`; idle prefixes make room, the longest unused first."""
        for key, prefix in list(self.prefixes.items()):
            if self._left >= slots:
                break
            if not prefix.users:
                del self.prefixes[key]
                self.give(prefix.slots)
        self._left -= slots
        return self._free[self._left : self._left + slots].copy()

    def give(self, slots: np.ndarray) -> None:
        self._free[self._left : self._left + len(slots)] = slots
        self._left += len(slots)

    def find_prefix(self, key: tuple) -> Prefix | None:
        if (found := self.prefixes.get(key)) is not None:
            self.prefixes.move_to_end(key)
        return found

    def forget(self, prefix: Prefix) -> None:
        """One whose K/V were never written: the pass that would have made them failed."""
        for key in [k for k, p in self.prefixes.items() if p is prefix]:
            del self.prefixes[key]
            self.give(prefix.slots)
