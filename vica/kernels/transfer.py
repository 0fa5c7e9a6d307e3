"""Bring small host arrays to the device without waiting for it.

A copy from ordinary memory waits for all work that the device has been given; a copy from pinned memory only queues.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

Shapes = Mapping[str, tuple[int, ...]]


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns one array of any type on the device."""
    return pinned(array, device).to(device, non_blocking=True)


def integers_to_device(arrays: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Returns several arrays of whole numbers on the device as int64. They travel in one copy and share one storage."""
    integers = {name: np.asarray(x, np.int64) for name, x in arrays.items()}
    whole = to_device(joined(list(integers.values())), device)
    return split_views(whole, {name: x.shape for name, x in integers.items()})


def pinned(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns the array as a host tensor whose copy to the device needs no waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Returns all values in one row, array after array."""
    return np.concatenate([x.ravel() for x in arrays])


def split_views(whole: torch.Tensor, shapes: Shapes) -> dict[str, torch.Tensor]:
    """Returns views of `whole` in these shapes, one after another: the inverse of `joined`."""
    parts = whole.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}
