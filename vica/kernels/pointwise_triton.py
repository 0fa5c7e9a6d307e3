"""Run pointwise.py in Triton, with gradients. A program takes one row; sums are float32."""

from typing import Any

import torch
import triton
import triton.language as tl

NORM_PARTS = 512  # programs that share the sum for a norm's weight gradient
HEADS_PER_PROGRAM = 8  # of the rotary kernel
GATE_BLOCK = 2048  # values per program of the gate kernels


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns the RMS norm over the last dimension."""
    out: torch.Tensor = Norm.apply(x, weight, eps)
    return out


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns x [..., H, D] with its halves rotated by the tables [..., D]."""
    out: torch.Tensor = Rotate.apply(x, cos, sin)
    return out


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) * up."""
    out: torch.Tensor = Gate.apply(gate, up)
    return out


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = x.contiguous()
        width, rows = x.shape[-1], x.numel() // x.shape[-1]
        out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        _norm[(rows,)](x, weight, out, scale, eps, width, triton.next_power_of_2(width), num_warps=8)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad = grad.contiguous()
        width, rows = x.shape[-1], x.numel() // x.shape[-1]
        learns = ctx.needs_input_grad[1]
        parts = min(NORM_PARTS, rows)
        grad_x = torch.empty_like(x)
        grad_weight = torch.empty(parts if learns else 1, width, dtype=torch.float32, device=x.device)
        _norm_backward[(parts,)](
            x, weight, scale, grad, grad_x, grad_weight, rows, width, triton.next_power_of_2(width), learns, num_warps=8
        )
        return grad_x, grad_weight.sum(0).to(weight.dtype) if learns else None, None


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, sin, -1), None, None


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """Returns x rotated forwards (`sign` 1) or backwards (-1)."""
    x = x.contiguous()
    heads, size = x.shape[-2:]
    rows = x.numel() // (heads * size)
    cos, sin = (t.expand(*x.shape[:-2], size).contiguous() for t in (cos, sin))
    out = torch.empty_like(x)
    grid = (rows, triton.cdiv(heads, HEADS_PER_PROGRAM))
    _rotate[grid](x, cos, sin, out, heads, size, sign, triton.next_power_of_2(size // 2), HEADS_PER_PROGRAM)
    return out


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _gate[(triton.cdiv(gate.numel(), GATE_BLOCK),)](gate, up, out, gate.numel(), GATE_BLOCK, num_warps=8)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        grid = (triton.cdiv(gate.numel(), GATE_BLOCK),)
        _gate_backward[grid](gate, up, grad.contiguous(), grad_gate, grad_up, gate.numel(), GATE_BLOCK, num_warps=8)
        return grad_gate, grad_up


@triton.jit
def _norm(x, weight, out, scale, eps, width, BLOCK: tl.constexpr):
    """A program takes one row, and leaves its scale for the backward pass."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    live = n < width
    v = tl.load(x + row * width + n, live, 0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    tl.store(scale + row, factor)
    v = (v * factor).to(x.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + n, live, 0.0).to(tl.float32)
    tl.store(out + row * width + n, (v * w).to(out.dtype.element_ty), live)


@triton.jit
def _norm_backward(x, weight, scale, grad, grad_x, grad_weight, rows, width, BLOCK: tl.constexpr, LEARNS: tl.constexpr):
    """A program takes every `parts`-th row, and sums these rows' share of the weight's gradient. LEARNS: the weight
    gets one."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    n = tl.arange(0, BLOCK)
    live = n < width
    w = tl.load(weight + n, live, 0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(part, rows, parts):
        at = row.to(tl.int64) * width + n  # type: ignore[attr-defined]  # Triton's range counts in its own integers
        factor = tl.load(scale + row)
        v = tl.load(x + at, live, 0.0).to(tl.float32) * factor
        g = tl.load(grad + at, live, 0.0).to(tl.float32)
        if LEARNS:
            total += g * v
        g = g * w
        tl.store(grad_x + at, (factor * (g - v * (tl.sum(g * v, 0) / width))).to(grad_x.dtype.element_ty), live)
    if LEARNS:
        tl.store(grad_weight + part.to(tl.int64) * width + n, total, live)


@triton.jit
def _rotate(x, cos, sin, out, heads, size, sign, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes BLOCK heads of one row. `size` is D; HALF is D / 2, rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, HALF)
    live = n < size // 2
    both = live[None] & (head < heads)[:, None]
    at = row * heads * size + head[:, None] * size + n[None]
    left = tl.load(x + at, both, 0.0)
    right = tl.load(x + at + size // 2, both, 0.0)
    left_cos = tl.load(cos + row * size + n, live, 0.0)[None].to(tl.float32)
    right_cos = tl.load(cos + row * size + size // 2 + n, live, 0.0)[None].to(tl.float32)
    left_sin = tl.load(sin + row * size + n, live, 0.0)[None].to(tl.float32)
    right_sin = tl.load(sin + row * size + size // 2 + n, live, 0.0)[None].to(tl.float32)
    a, b = left.to(tl.float32), right.to(tl.float32)
    # Rotating backwards (sign -1) relies on tables that are the same in both halves.
    tl.store(out + at, (a * left_cos - sign * b * left_sin).to(out.dtype.element_ty), both)
    tl.store(out + at + size // 2, (b * right_cos + sign * a * right_sin).to(out.dtype.element_ty), both)


@triton.jit
def _gate(gate, up, out, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < size
    g = tl.load(gate + n, live, 0.0).to(tl.float32)
    u = tl.load(up + n, live, 0.0).to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(out + n, (silu * u).to(out.dtype.element_ty), live)


@triton.jit
def _gate_backward(gate, up, grad, grad_gate, grad_up, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < size
    g = tl.load(gate + n, live, 0.0).to(tl.float32)
    u = tl.load(up + n, live, 0.0).to(tl.float32)
    d = tl.load(grad + n, live, 0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-g))
    tl.store(grad_up + n, (d * g * s).to(grad_up.dtype.element_ty), live)
    tl.store(grad_gate + n, (d * u * s * (1 + g * (1 - s))).to(grad_gate.dtype.element_ty), live)
