"""pointwise.py in Triton, with gradients. Rows are programs, sums are float32."""

import torch
import triton
import triton.language as tl

NORM_PARTS = 512  # programs that share the sum for a norm's weight
HEADS = 8  # that one program rotates
GATE_BLOCK = 2048


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return Norm.apply(x, weight, eps)


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return Rotate.apply(x, cos, sin)


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return Gate.apply(gate, up)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        width, rows = x.shape[-1], x.numel() // x.shape[-1]
        out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        _norm[(rows,)](x, weight, out, scale, eps, width, triton.next_power_of_2(width), num_warps=8)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad = grad.contiguous()
        width, rows = x.shape[-1], x.numel() // x.shape[-1]
        learns = ctx.needs_input_grad[1]
        parts = min(NORM_PARTS, rows)
        of_x = torch.empty_like(x)
        of_weight = torch.empty(parts if learns else 1, width, dtype=torch.float32, device=x.device)
        _norm_backward[(parts,)](
            x, weight, scale, grad, of_x, of_weight, rows, width, triton.next_power_of_2(width), learns, num_warps=8
        )
        return of_x, of_weight.sum(0).to(weight.dtype) if learns else None, None


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        return turn(grad, *ctx.saved_tensors, -1), None, None


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    x = x.contiguous()
    heads, size = x.shape[-2:]
    rows = x.numel() // (heads * size)
    cos, sin = (t.expand(*x.shape[:-2], size).contiguous() for t in (cos, sin))
    out = torch.empty_like(x)
    grid = (rows, triton.cdiv(heads, HEADS))
    _rotate[grid](x, cos, sin, out, heads, size, sign, triton.next_power_of_2(size // 2), HEADS)
    return out


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _gate[(triton.cdiv(gate.numel(), GATE_BLOCK),)](gate, up, out, gate.numel(), GATE_BLOCK, num_warps=8)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        grid = (triton.cdiv(gate.numel(), GATE_BLOCK),)
        _gate_backward[grid](gate, up, grad.contiguous(), of_gate, of_up, gate.numel(), GATE_BLOCK, num_warps=8)
        return of_gate, of_up


@triton.jit
def _norm(x, weight, out, scale, eps, width, BLOCK: tl.constexpr):
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
def _norm_backward(x, weight, scale, grad, of_x, of_weight, rows, width, BLOCK: tl.constexpr, LEARNS: tl.constexpr):
    """Each program takes every so many-th row, and sums what the weight gets of them."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    n = tl.arange(0, BLOCK)
    live = n < width
    w = tl.load(weight + n, live, 0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(part, rows, parts):
        at = row.to(tl.int64) * width + n
        factor = tl.load(scale + row)
        v = tl.load(x + at, live, 0.0).to(tl.float32) * factor
        g = tl.load(grad + at, live, 0.0).to(tl.float32)
        if LEARNS:
            total += g * v
        g = g * w
        tl.store(of_x + at, (factor * (g - v * (tl.sum(g * v, 0) / width))).to(of_x.dtype.element_ty), live)
    if LEARNS:
        tl.store(of_weight + part.to(tl.int64) * width + n, total, live)


@triton.jit
def _rotate(x, cos, sin, out, heads, size, sign, HALF: tl.constexpr, HEADS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
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
    # backward (sign -1) uses that the tables are the same in both halves
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
def _gate_backward(gate, up, grad, of_gate, of_up, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = n < size
    g = tl.load(gate + n, live, 0.0).to(tl.float32)
    u = tl.load(up + n, live, 0.0).to(tl.float32)
    d = tl.load(grad + n, live, 0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-g))
    tl.store(of_up + n, (d * g * s).to(of_up.dtype.element_ty), live)
    tl.store(of_gate + n, (d * u * s * (1 + g * (1 - s))).to(of_gate.dtype.element_ty), live)
