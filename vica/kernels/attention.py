"""Attention of packed queries over chosen keys, by several kernels with one meaning.

A run is a stretch of consecutive queries of one sequence. Its key list ends with the run's own tokens, so within it
causality is lower-right: the last query sees all keys, the one before it all but the last, and so on. Ragged batches,
images in any place and cached turns are all lists of runs; query rows lie packed, run after run.

Shape legend: N queries, R rows of the key buffer, H heads, G runs of a padded group, D head_dim.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from .transfer import to_device

# torch 2.11's varlen_attn has no such argument.
VARLEN_GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class Runs:
    """Query runs with their key lists: rows of a key buffer.

    `parts` splits the runs into groups that kernels with a dense shape pad together: prefix runs and text runs differ
    tenfold in their number of keys.
    """

    def __init__(self, q_lens: list[int], key_lists: list[np.ndarray], parts: list[int], device: torch.device) -> None:
        self.q_lens, self.k_lens = q_lens, [len(x) for x in key_lists]
        self.key_lists, self.parts, self.device = key_lists, parts, device

    def pick(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the keys' rows of all runs, one run after another."""
        if self.in_order and len(self.keys) == len(rows):
            return rows
        if self.inverse is not None and len(self.inverse) == len(rows):
            return Permute.apply(rows, self.key_index, self.inverse)
        return rows.index_select(0, self.key_index)

    @cached_property
    def keys(self) -> np.ndarray:
        return np.concatenate(self.key_lists)

    @cached_property
    def key_index(self) -> torch.Tensor:
        return to_device(self.keys, self.device)

    @cached_property
    def in_order(self) -> bool:
        return bool((self.keys == np.arange(len(self.keys))).all())

    @cached_property
    def inverse(self) -> torch.Tensor | None:
        """The index that undoes `key_index`, where no two runs share a key, as with a frozen prefix."""
        back = np.argsort(self.keys)
        whole = (self.keys[back] == np.arange(len(self.keys))).all()
        return to_device(back, self.device) if whole else None

    @cached_property
    def cu_seqlens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each run's queries and keys begin, and the end of all, as int32."""
        starts = [np.array([0, *accumulate(x)], np.int32) for x in (self.q_lens, self.k_lens)]
        return to_device(starts[0], self.device), to_device(starts[1], self.device)

    @cached_property
    def groups(self) -> list["PaddedRuns"]:
        groups, run, row = [], 0, 0
        for size in self.parts:
            if size:
                q_lens = self.q_lens[run : run + size]
                groups.append(PaddedRuns(row, q_lens, self.key_lists[run : run + size], self.device))
                run, row = run + size, row + sum(q_lens)
        return groups


class Permute(torch.autograd.Function):
    """index_select by a permutation. Its gradient is the inverse permutation, where torch would add up rows one by
    one."""

    @staticmethod
    def forward(ctx, rows, index, inverse):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class PaddedRuns:
    """Runs padded to one shape. Equal runs need neither padding nor a mask."""

    def __init__(self, first_row: int, q_lens: list[int], key_lists: list[np.ndarray], device: torch.device) -> None:
        k_lens = [len(x) for x in key_lists]
        self.rows, self.size = slice(first_row, first_row + sum(q_lens)), len(q_lens)
        self.q_len, self.k_len = max(q_lens), max(k_lens)
        self.uniform = min(q_lens) == self.q_len and min(k_lens) == self.k_len
        keys = np.zeros((self.size, self.k_len), np.int64)
        for i, x in enumerate(key_lists):
            keys[i, : len(x)] = x
        self.keys = to_device(keys, device)
        if not self.uniform:
            self._pad(np.array(q_lens)[:, None], np.array(k_lens)[:, None], device)

    def _pad(self, q_lens: np.ndarray, k_lens: np.ndarray, device: torch.device) -> None:
        here = np.arange(self.q_len)[None] < q_lens
        self.from_padded = to_device(np.flatnonzero(here), device)
        self.to_padded = to_device(np.maximum(np.cumsum(here) - 1, 0).reshape(here.shape), device)
        # A padding query may see any key but a hole: its result is not used, but it must not be NaN.
        last_key = np.minimum(k_lens - q_lens + np.arange(self.q_len), k_lens - 1)
        self.mask = to_device(np.arange(self.k_len) <= last_key[..., None], device)[:, None]

    def gather(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the group's queries, keys and values, [G, H, length, D] each."""
        q = q[self.rows]
        q = q.view(self.size, self.q_len, *q.shape[1:]) if self.uniform else q[self.to_padded]
        return q.transpose(1, 2), k[self.keys].transpose(1, 2), v[self.keys].transpose(1, 2)

    def scatter(self, out: torch.Tensor) -> torch.Tensor:
        """Returns a result [G, H, length, D] as packed rows."""
        out = out.transpose(1, 2).flatten(0, 1)
        return out if self.uniform else out[self.from_padded]


Heads = Callable[..., torch.Tensor]


def by_groups(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Runs, attend: Heads, uniform_mask: Callable
) -> torch.Tensor:
    """Returns `attend` of every padded group; `uniform_mask` makes the mask of a group without padding."""
    outs = []
    for group in runs.groups:
        mask = uniform_mask(group.q_len, group.k_len, q.device) if group.uniform else group.mask
        outs.append(group.scatter(attend(*group.gather(q, k, v), mask)))
    return torch.cat(outs)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Runs uniform groups on CUDA's flash kernels, without a mask tensor, and ragged ones with one."""
    return by_groups(q, k, v, runs, sdpa_heads, lower_right)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Computes plain products and a float32 softmax."""
    return by_groups(q, k, v, runs, eager_heads, causal_mask)


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Runs torch's variable-length flash kernel: no padding and no mask on any layout. Half precision on CUDA."""
    k, v = runs.pick(k), runs.pick(v)
    if k.shape[1] != q.shape[1] and not VARLEN_GQA:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # window (-1, 0) means causal, lower-right
    mixed: Any = varlen_attn(
        q, k, v, *runs.cu_seqlens, max(runs.q_lens), max(runs.k_lens), window_size=(-1, 0), **VARLEN_GQA
    )
    return mixed


def flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Runs the flash-attn package, where installed."""
    from flash_attn import flash_attn_varlen_func

    k, v = runs.pick(k), runs.pick(v)
    return flash_attn_varlen_func(q, k, v, *runs.cu_seqlens, max(runs.q_lens), max(runs.k_lens), causal=True)


KERNELS = {"sdpa": sdpa, "eager": eager, "varlen": varlen, "flash_attn": flash_attn}


@dataclass(frozen=True)
class Kernel:
    """Chooses the kernel: one by its own name, else the best for transformers' `attn_implementation`."""

    name: str | None = None
    implementation: str | None = None

    @property
    def is_eager(self) -> bool:
        return (self.name or self.implementation) == "eager"

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Runs) -> torch.Tensor:
        return KERNELS[self.name or self._best(q)](q, k, v, runs) if len(q) else q

    def _best(self, q: torch.Tensor) -> str:
        """Returns a flash kernel for half precision on CUDA and head sizes in steps of 8 up to 256, else SDPA."""
        if self.is_eager:
            return "eager"
        if not (
            q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        ):
            return "sdpa"
        return "flash_attn" if (self.implementation or "").startswith("flash_attention") else "varlen"


def sdpa_backends(device: torch.device) -> AbstractContextManager:
    """Allows all of SDPA's kernels but cuDNN's on CUDA: that one plans anew for every length of keys and so costs 2 ms
    of CPU time a layer in decoding. Chosen call by call, so that a checkpoint's second pass chooses the same."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


# --- [B, H, T, D] primitives --------------------------------------------------------------------------------------


def sdpa_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    with sdpa_backends(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def eager_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(q.dtype) @ v


def repeat_heads(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Returns keys or values with a head for each query head (grouped-query attention): not every SDPA kernel can
    share them."""
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def lower_right(q_len: int, k_len: int, device: torch.device) -> torch.Tensor | None:
    """Returns SDPA's mask for uniform runs: on CUDA a marker that its flash kernels understand. The CPU would expand
    the marker to a mask anyway, and dispatch modes such as torch's FLOP counter cannot handle it."""
    if q_len == 1:
        return None
    return causal_lower_right(q_len, k_len) if device.type == "cuda" else causal_mask(q_len, k_len, device)


def causal_mask(q_len: int, k_len: int, device: torch.device) -> torch.Tensor:
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)
