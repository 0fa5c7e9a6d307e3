"""Run the vision tower's steps between its matrix products in Triton: one pass over the data where torch takes
several."""

import torch
import triton
import triton.language as tl


def add_norm(hidden: torch.Tensor, update: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """Adds `update` to `hidden` in place and returns the layer norm of the sum."""
    out = torch.empty_like(hidden)
    width = hidden.shape[-1]
    _add_norm[(hidden.numel() // width,)](
        hidden, update, norm.weight, norm.bias, out, norm.eps, width, triton.next_power_of_2(width), num_warps=4
    )
    return out


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Computes x * sigmoid(1.702 x) in place and returns x."""
    _quick_gelu[(triton.cdiv(x.numel(), 4096),)](x, x.numel(), 4096, num_warps=8)
    return x


@triton.jit
def _add_norm(hidden, update, weight, bias, out, eps, width, BLOCK: tl.constexpr):
    """A program takes one row. The sum is rounded to hidden's type before it is normed, as torch does."""
    at = tl.program_id(0).to(tl.int64) * width
    n = tl.arange(0, BLOCK)
    live = n < width
    x = tl.load(hidden + at + n, live, 0.0).to(tl.float32) + tl.load(update + at + n, live, 0.0).to(tl.float32)
    x = x.to(hidden.dtype.element_ty)
    tl.store(hidden + at + n, x, live)
    x = x.to(tl.float32)
    centred = tl.where(live, x - tl.sum(x, 0) / width, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    y = y * tl.load(weight + n, live, 0.0).to(tl.float32) + tl.load(bias + n, live, 0.0).to(tl.float32)
    tl.store(out + at + n, y.to(out.dtype.element_ty), live)


@triton.jit
def _quick_gelu(x, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + n, n < size, 0.0).to(tl.float32)
    tl.store(x + n, (v / (1 + tl.exp(-1.702 * v))).to(x.dtype.element_ty), n < size)
