"""CUDA graphs: a pass that has run once in a shape is captured, and replayed from then on without launch costs."""

import math
from collections.abc import Callable

import numpy as np
import torch

from ..kernels.work import host_tensor, to_device, views


class Graphs:
    def __init__(self, device: torch.device, enabled: bool):
        self.device, self.enabled = device, enabled
        self.inputs: dict[tuple, StaticInputs] = {}
        self.graphs: dict[tuple, tuple] = {}
        self.pool = None

    def run(self, key: tuple, arrays: dict[str, np.ndarray], capacity: dict[str, int] | None, work: Callable):
        """`work` on the arrays as tensors. With a capacity for each array it is captured: it must then do the same for
        every content, and results are overwritten by the next run. Arrays beyond capacity are worked on plainly.
        The first run of a key is plain too, so that nothing is compiled or allocated for good within a capture."""
        if not self.enabled or capacity is None or any(len(x) > capacity[name] for name, x in arrays.items()):
            return work(to_device(arrays, self.device))
        if key not in self.inputs:
            inputs = StaticInputs(arrays, capacity, self.device)
            out = work(inputs.hold(arrays))
            self.inputs[key] = inputs  # not before: what failed plainly must not be captured next
            return out
        tensors = self.inputs[key].hold(arrays)
        if key not in self.graphs:
            try:
                self.graphs[key] = self._capture(work, tensors)
            except BaseException:
                self.clear()  # what is left of it in the pool would be in the way of other captures
                raise
        graph, out = self.graphs[key]
        graph.replay()
        return out

    def clear(self) -> None:
        """Gives back the memory of all that was captured; each pass starts plainly again."""
        self.inputs.clear()
        self.graphs.clear()
        self.pool = None  # torch takes no capture into a pool whose graphs are all gone

    def _capture(self, work: Callable, tensors: dict[str, torch.Tensor]):
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self.device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                out = work(tensors)
        except BaseException:
            torch.cuda.set_stream(stream)  # torch leaves its own in place where a broken capture cannot be ended
            raise
        return graph, out


class StaticInputs:
    """Tensors that stay where they are while what they hold changes."""

    def __init__(self, arrays: dict[str, np.ndarray], capacity: dict[str, int], device: torch.device):
        self.shapes = {name: (capacity[name], *x.shape[1:]) for name, x in arrays.items()}
        size = sum(math.prod(shape) for shape in self.shapes.values())
        self.whole = torch.zeros(size, dtype=torch.int64, device=device)
        self.tensors = views(self.whole, self.shapes)
        self.content = None

    def hold(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        if arrays is not self.content:
            padded = [np.zeros(shape, np.int64) for shape in self.shapes.values()]
            for room, x in zip(padded, arrays.values()):
                room[: len(x)] = x
            self.whole.copy_(host_tensor(padded, self.whole.device), non_blocking=True)
            self.content = arrays
        return self.tensors
