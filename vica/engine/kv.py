"""Hold the K/V of text tokens: one pool that is given out token by token, and the shared prefixes that stay in it."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch

PADDING_KV = 0  # K/V index that the padding of a captured pass writes to

PrefixKey = tuple[Hashable, ...]


@dataclass(eq=False)
class SharedPrefix:
    """The first tokens of prompts that begin alike: computed once, then read by all of them."""

    kv_index: np.ndarray
    users: int = 0


class TextPool:
    """`size` tokens with the K/V indices 1 to `size`; index 0 is PADDING_KV."""

    def __init__(
        self, layers: int, size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        make = torch.zeros if device.type == "cpu" else torch.empty  # a CPU's zeros take no memory until they are used
        self.kv = make(layers, size + 1, 2, kv_heads, head_dim, dtype=dtype, device=device)
        self.kv[:, PADDING_KV] = 0
        self.size = size
        self._free = np.arange(size, 0, -1)
        self._left = size
        self.prefixes: OrderedDict[PrefixKey, SharedPrefix] = OrderedDict()  # least recently used first

    @property
    def free(self) -> int:
        return self._left

    @property
    def free_indices(self) -> np.ndarray:
        return self._free[: self._left]

    def can_take(self, count: int) -> bool:
        """Whether `take` finds so many, those of idle prefixes included."""
        return count <= self._left or count <= self._left + sum(
            len(p.kv_index) for p in self.prefixes.values() if not p.users
        )

    def take(self, count: int) -> np.ndarray:
        """Returns so many indices; call it only after `can_take`. Idle prefixes make room, the longest unused first."""
        for key, prefix in list(self.prefixes.items()):
            if self._left >= count:
                break
            if not prefix.users:
                del self.prefixes[key]
                self.give(prefix.kv_index)
        self._left -= count
        return self._free[self._left : self._left + count].copy()

    def give(self, kv_index: np.ndarray) -> None:
        """Takes indices back."""
        self._free[self._left : self._left + len(kv_index)] = kv_index
        self._left += len(kv_index)

    def find_prefix(self, key: PrefixKey) -> SharedPrefix | None:
        """Returns the prefix, which is then the most recently used."""
        if (found := self.prefixes.get(key)) is not None:
            self.prefixes.move_to_end(key)
        return found

    def forget(self, prefix: SharedPrefix) -> None:
        """Removes a prefix whose K/V were never written because the pass that should have made them failed."""
        for key in [k for k, p in self.prefixes.items() if p is prefix]:
            del self.prefixes[key]
            self.give(prefix.kv_index)
