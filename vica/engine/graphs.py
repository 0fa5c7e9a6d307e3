"""Capture passes as CUDA graphs: a shape that has run once is captured, and from then on replayed
without launch costs."""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch

from ..kernels.transfer import integers_to_device, joined, pinned, split_views

Key = tuple[Hashable, ...]
Work = Callable[[dict[str, torch.Tensor]], Any]


class Graphs:
    """The captured passes of one device, by key. `enabled` False: all run uncaptured."""

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.device, self.enabled = device, enabled
        self.inputs: dict[Key, StaticInputs] = {}
        self.graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Any]] = {}  # with each graph's results
        self.pool: Any = None  # memory that all graphs share

    def run(self, key: Key, arrays: Mapping[str, np.ndarray], capacity: Mapping[str, int] | None, work: Work) -> Any:
        """Returns what `work` returns for the arrays as tensors.

        With a `capacity` (a length for each array) the pass is captured: `work` must then do the same for any content,
        and the next run overwrites the results. Arrays beyond their capacity run uncaptured. So does the first run of a
        key, because nothing may be compiled, or allocated to stay, during a capture.
        """
        if not self.enabled or capacity is None or any(len(x) > capacity[name] for name, x in arrays.items()):
            return work(integers_to_device(arrays, self.device))
        if key not in self.inputs:
            inputs = StaticInputs(arrays, capacity, self.device)
            out = work(inputs.write(arrays))
            self.inputs[key] = inputs  # not before: a pass that failed must not be captured next
            return out
        tensors = self.inputs[key].write(arrays)
        if key not in self.graphs:
            try:
                self.graphs[key] = self._capture(work, tensors)
            except BaseException:
                self.clear()  # the broken capture's memory in the pool would disturb other captures
                raise
        graph, out = self.graphs[key]
        graph.replay()
        return out

    def clear(self) -> None:
        """Gives back the memory of all captured passes; each starts uncaptured again."""
        self.inputs.clear()
        self.graphs.clear()
        self.pool = None  # torch captures nothing into a pool whose graphs are all gone

    def _capture(self, work: Work, tensors: dict[str, torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, Any]:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self.device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                out = work(tensors)
        except BaseException:
            torch.cuda.set_stream(stream)  # torch leaves its own stream in place if it cannot end a broken capture
            raise
        return graph, out


class StaticInputs:
    """A captured pass's input tensors, which stay where they are while their content changes."""

    def __init__(self, arrays: Mapping[str, np.ndarray], capacity: Mapping[str, int], device: torch.device) -> None:
        self.shapes = {name: (capacity[name], *x.shape[1:]) for name, x in arrays.items()}
        size = sum(math.prod(shape) for shape in self.shapes.values())
        self.whole = torch.zeros(size, dtype=torch.int64, device=device)
        self.tensors = split_views(self.whole, self.shapes)
        self.content: Mapping[str, np.ndarray] | None = None

    def write(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Returns the tensors, which hold the arrays followed by zeros. The same arrays as before are not copied again:
        a decode batch that has not changed costs nothing."""
        if arrays is not self.content:
            padded = [np.zeros(shape, np.int64) for shape in self.shapes.values()]
            for room, x in zip(padded, arrays.values()):
                room[: len(x)] = x
            self.whole.copy_(pinned(joined(padded), self.whole.device), non_blocking=True)
            self.content = arrays
        return self.tensors
