"""Run layer_torch.py on CUDA: Triton kernels for all that lies between the large matrix products, which cuBLAS does.

Each kernel does a whole step of a layer in one pass over its data: norms, rotary together with the writing of K/V,
attention over text and over images, the gate. Products of few rows have kernels of their own, which read weights at
nearly the memory's full rate. On Hopper and later, each kernel starts while the one before still runs (programmatic
dependent launch).

Shape legend: N rows, H query heads, G key heads, D head_dim, DP D padded to a power of two, BLOCK_M rows and BLOCK_N
keys of one program. In products: M rows, N columns and K terms of out [M, N] = x [M, K] @ weight [N, K].T.
"""

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from .layer_torch import Partial, Shape, TorchOps
from .work import ImageWork, Step, key_blocks

HEADS_PER_PROGRAM = 8  # of the rotary and merging kernels
FEW_ROWS = 32  # up to so many rows these products are faster than cuBLAS's
LOG2E = 1.4426950408889634  # softmaxes use powers of two, which the hardware has


class CudaOps(TorchOps):
    """TorchOps with the same results up to rounding. `rope_store` overwrites `qkv`."""

    def __init__(self, shape: Shape, cos: torch.Tensor, sin: torch.Tensor):
        super().__init__(shape, cos, sin)
        self.hopper = torch.cuda.get_device_capability(cos.device)[0] >= 9
        self.padded_dim = max(16, triton.next_power_of_2(shape.head_dim))  # matrix products take no less than 16
        # Per block of a product's columns, the programs that have finished their part; zero between launches.
        self.arrived = torch.zeros(128, dtype=torch.int32, device=cos.device)
        self.half = triton.next_power_of_2(shape.head_dim // 2)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out, width = torch.empty_like(x), x.shape[1]
        _rms_norm[(len(x),)](
            x, weight, out, self.shape.eps, width, triton.next_power_of_2(width), self.hopper, num_warps=8,
            launch_pdl=self.hopper,
        )  # fmt: skip
        return out

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if bias is not None or not self._few(x, weight):
            return super().linear(x, weight, bias)
        return self._multiply(x, weight, torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device), add=False)

    def add_linear(
        self, hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        if bias is not None or not self._few(x, weight):
            super().add_linear(hidden, x, weight, bias)
        else:
            self._multiply(x, weight, hidden, add=True)

    def norm_gated(
        self, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.shape.activation != "silu":
            return super().norm_gated(x, norm, weight, bias)
        size, x = len(weight) // 2, self.norm(x, norm)
        out = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
        if len(x) == 1 and bias is None and self._few(x, weight):
            return self._multiply_row(x, weight, out, gated=True)
        both = self.linear(x, weight, bias)
        _gate[(len(x), triton.cdiv(size, 1024))](both, out, size, 1024, self.hopper, launch_pdl=self.hopper)
        return out

    def _few(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether the own products take these shapes, and are faster."""
        even = weight.shape[0] % 64 == 0 and weight.shape[1] % 256 == 0
        return len(x) <= FEW_ROWS and even and x.is_contiguous()

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, add: bool) -> torch.Tensor:
        """Writes x @ weight.T to `out`, or adds it, for at most FEW_ROWS rows."""
        if len(x) == 1:
            return self._multiply_row(x, weight, out, add=add)
        (rows, columns), (size, _) = x.shape, weight.shape
        stages = 2 if x.element_size() > 2 else 3 if size >= 8192 else 5
        splits = 1 if size >= 8192 else 2
        parts = torch.empty(splits, rows, size, dtype=torch.float32, device=x.device) if splits > 1 else x
        _multiply_rows[(size // 64, splits)](
            x, weight, out, parts, self.arrived, rows, size, columns, triton.next_power_of_2(max(16, rows)), 64, 128,
            splits, add, self.hopper, num_warps=4, num_stages=stages, launch_pdl=self.hopper,
        )  # fmt: skip
        return out

    def _multiply_row(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, add: bool = False, gated: bool = False
    ) -> torch.Tensor:
        columns = weight.shape[1]
        # The fastest setting on an H200: programs of one warp where the weight is narrow.
        step, warps = (1024, 4 if gated else 8) if out.shape[1] >= 8192 and columns % 1024 == 0 else (256, 1)
        _multiply_row[(out.shape[1],)](
            x, weight, out, out.shape[1], columns, step, add, gated, self.hopper, num_warps=warps,
            launch_pdl=self.hopper,
        )  # fmt: skip
        return out

    def rope_store(
        self, qkv: torch.Tensor, positions: torch.Tensor, kv_index: torch.Tensor, pool: torch.Tensor
    ) -> torch.Tensor:
        s = self.shape
        _rope_store[(len(qkv), triton.cdiv(s.heads + 2 * s.kv_heads, HEADS_PER_PROGRAM))](
            qkv, pool, self.cos, self.sin, positions, kv_index, qkv.stride(0), s.heads, s.kv_heads, s.head_dim,
            self.half, HEADS_PER_PROGRAM, self.hopper, launch_pdl=self.hopper,
        )  # fmt: skip
        return qkv[:, : s.heads]

    def image_store(
        self, kv: torch.Tensor, layer: int, place: Mapping[str, torch.Tensor], images: Sequence[torch.Tensor]
    ) -> None:
        s = self.shape
        _image_store[(len(kv), triton.cdiv(2 * s.kv_heads, HEADS_PER_PROGRAM))](
            kv, _address(kv), place["address"], place["tokens"], place["first"], place["image"], place["positions"],
            self.cos, self.sin, layer, s.kv_heads, s.head_dim, self.half, HEADS_PER_PROGRAM, self.hopper,
            launch_pdl=self.hopper,
        )  # fmt: skip

    def attend(
        self, q: torch.Tensor, pool: torch.Tensor, step: Step, frozen: bool, image_layer: int | None
    ) -> torch.Tensor:
        images = step.images if image_layer is not None else None
        tiles, first = (step.tiles[step.frozen_tiles :], step.frozen_rows) if frozen else (step.tiles, 0)
        mixed = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        if images is None and step.splits == 1:
            self._text(q, pool, tiles, step, mixed, None)
            return mixed[first:]
        text = self._partials(q, step.splits * len(q))
        self._text(q, pool, tiles, step, *text)
        image, starts, parts = text, step.limit, step.limit  # any tensors: the kernel reads none of them without images
        if images is not None and image_layer is not None:
            image, starts, parts = self._image(q, pool, images, image_layer), images.starts, images.parts
        grid = (len(q) - first, triton.cdiv(q.shape[1], HEADS_PER_PROGRAM))
        _merge[grid](
            *text, *image, starts, parts, mixed, first, len(q), q.shape[1], q.shape[2],
            self.padded_dim, HEADS_PER_PROGRAM, step.splits, images is not None, self.hopper,
            launch_pdl=self.hopper,
        )  # fmt: skip
        return mixed[first:]

    def _partials(self, q: torch.Tensor, count: int) -> Partial:
        """Returns room for so many partial results."""
        shape = (count, *q.shape[1:])
        return (
            torch.empty(shape, dtype=torch.float32, device=q.device),
            torch.empty(shape[:2], dtype=torch.float32, device=q.device),
        )

    def _text(
        self,
        q: torch.Tensor,
        pool: torch.Tensor,
        tiles: torch.Tensor,
        step: Step,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Writes attention over text to `out`: partial results with their LSE, or final ones where `lse` is None."""
        s, rows = self.shape, max(16, step.block)
        keys, stages = key_blocks(rows, q.element_size() * self.padded_dim, 2)
        _text_attention[(s.heads, len(tiles), step.splits)](
            q, pool, tiles, step.kv_table, step.limit, out, out if lse is None else lse, q.stride(0),
            step.kv_table.stride(0), len(q), s.scale * LOG2E, s.heads, s.kv_heads, s.head_dim, self.padded_dim, rows,
            keys, step.splits, lse is not None, self.hopper, num_warps=2 if rows == 16 else 4, num_stages=stages,
            launch_pdl=self.hopper,
        )  # fmt: skip

    def _image(self, q: torch.Tensor, pool: torch.Tensor, images: ImageWork, layer: int) -> Partial:
        s, rows = self.shape, max(16, images.block)
        keys, stages = key_blocks(rows, q.element_size() * self.padded_dim, 2 if rows == 16 else 3)
        out, lse = self._partials(q, len(images.rows))
        _image_attention[(s.heads, len(images.items))](
            q, pool, _address(pool), images.items, images.rows, out, lse, q.stride(0), layer, s.scale * LOG2E, s.heads,
            s.kv_heads, s.head_dim, self.padded_dim, rows, keys, self.hopper,
            num_warps=2 if rows == 16 else 4, num_stages=stages, launch_pdl=self.hopper,
        )  # fmt: skip
        return out, lse


def _address(x: torch.Tensor) -> int:
    """Returns the tensor's address in elements."""
    return x.data_ptr() // x.element_size()


@triton.jit
def _wait(HOPPER: tl.constexpr):
    """Waits for the previous kernel, which may still run. All earlier ones are done, because each kernel releases
    its successor only after its own wait. Before _wait, read nothing that the previous kernel writes, and write
    nothing."""
    if HOPPER:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _multiply_row(
    x, weight, out, N, K: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, HOPPER: tl.constexpr
):
    """Computes out [N] = weight [N, K] @ x [K], one program a value. ADD: adds it to `out`. GATED: the weight is
    [2 * N, K], gate above up, and out = silu(gate) * up. Weights are read before _wait, as no kernel writes them."""
    n, k = tl.program_id(0), tl.arange(0, BK)
    at = weight + n.to(tl.int64) * K + k
    second = at + N.to(tl.int64) * K
    w = tl.load(at)
    w2 = tl.load(second) if GATED else w
    _wait(HOPPER)
    start = tl.load(out + n).to(tl.float32) if ADD else 0.0
    v = tl.load(x + k).to(tl.float32)
    acc, acc2 = w.to(tl.float32) * v, w2.to(tl.float32) * v
    for i in range(BK, K, BK):
        v = tl.load(x + i + k).to(tl.float32)
        acc += tl.load(at + i).to(tl.float32) * v
        if GATED:
            acc2 += tl.load(second + i).to(tl.float32) * v
    y = tl.sum(acc, 0)
    if GATED:
        y = y / (1 + tl.exp(-y)) * tl.sum(acc2, 0)
    tl.store(out + n, (y + start).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["M"])
def _multiply_rows(
    x, weight, out, parts, arrived, M, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLITS: tl.constexpr, ADD: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """Computes out [M, N] = x [M, K] @ weight [N, K].T for few rows. ADD: adds it to `out`.

    A program takes BN columns of `out` and all M rows (at most BM), over one of SPLITS parts of K: N alone has too few
    blocks to fill the device. Each program stores its sum in `parts` [SPLITS, M, N] and counts itself in `arrived`
    [N / BN]. The last to arrive adds the parts up, always in the same order, so that results repeat exactly, and
    resets the counter. The tile is computed transposed, [BN, BM], so that the weight is the product's long side.
    """
    _wait(HOPPER)
    block, split = tl.program_id(0), tl.program_id(1)
    n, m, k = block * BN + tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BK)
    live = m[None, :] < M
    to = out + m[None, :] * N + n[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    share: tl.constexpr = (K // BK + SPLITS - 1) // SPLITS * BK
    for i in range(split * share, tl.minimum(K, (split + 1) * share), BK):
        w = tl.load(weight + n.to(tl.int64)[:, None] * K + (i + k)[None, :])
        v = tl.load(x + m[None, :] * K + (i + k)[:, None], live, 0.0)
        acc = tl.dot(w, v, acc, input_precision="ieee")
    if SPLITS > 1:
        part = parts + m[None, :] * N + n[:, None]
        tl.store(part + split * M * N, acc, live)
        tl.debug_barrier()  # all threads must have stored before one counts the program
        if tl.atomic_add(arrived + block, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(arrived + block, 0)
        acc = tl.zeros([BN, BM], tl.float32)
        for other in range(SPLITS):
            acc += tl.load(part + other * M * N, live, 0.0, cache_modifier=".cg")
    if ADD:
        acc += tl.load(to, live, 0.0).to(tl.float32)
    tl.store(to, acc.to(out.dtype.element_ty), live)


@triton.jit
def _gate(both, out, size, BLOCK: tl.constexpr, HOPPER: tl.constexpr):
    """Computes silu(gate) * up of rows [gate; up], `size` values each."""
    _wait(HOPPER)
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + row * 2 * size + n, n < size, 0.0).to(tl.float32)
    up = tl.load(both + row * 2 * size + size + n, n < size, 0.0).to(tl.float32)
    tl.store(out + row * size + n, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), n < size)


@triton.jit
def _rms_norm(x, weight, out, eps, width, BLOCK: tl.constexpr, HOPPER: tl.constexpr):
    """Norms one row a program. The scaled row is rounded before the weight is applied, as TorchOps.norm does."""
    n = tl.arange(0, BLOCK)
    w = tl.load(weight + n, n < width, 0.0).to(tl.float32)
    _wait(HOPPER)
    row = tl.program_id(0).to(tl.int64)
    v = tl.load(x + row * width + n, n < width, 0.0).to(tl.float32)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / width + eps)
    v = v.to(out.dtype.element_ty).to(tl.float32) * w
    tl.store(out + row * width + n, v.to(out.dtype.element_ty), n < width)


@triton.jit
def _rotated(x, cos, sin, where, live, turn, D: tl.constexpr, HALF: tl.constexpr):
    """Returns both halves of the heads that begin at x + where [heads, 1], rotated where `turn` [heads, 1] is true."""
    d = tl.arange(0, HALF)[None, :]
    inside = d < D // 2
    left = tl.load(x + where + d, live & inside, 0.0).to(tl.float32)
    right = tl.load(x + where + D // 2 + d, live & inside, 0.0).to(tl.float32)
    c, s = tl.load(cos + d, inside, 0.0), tl.load(sin + d, inside, 0.0)
    return tl.where(turn, left * c - right * s, left), tl.where(turn, right * c + left * s, right)


@triton.jit
def _rope_store(
    qkv, pool, cos, sin, positions, kv_index, stride, H, G, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    HOPPER: tl.constexpr,
):  # fmt: skip
    """Takes BLOCK heads of one row: queries are rotated in place, keys rotated into the pool, values copied there."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    live = head < H + 2 * G
    at, index = tl.load(positions + row) * D, tl.load(kv_index + row)
    base = qkv + row * stride
    _wait(HOPPER)
    left, right = _rotated(base, cos + at, sin + at, head * D, live, head < H + G, D, HALF)
    # A token's keys, then its values, lie side by side in the pool.
    to = tl.where(head < H, base + head * D, pool + index * 2 * G * D + (head - H) * D)
    d = tl.arange(0, HALF)[None, :]
    live = live & (d < D // 2)
    tl.store(to + d, left.to(qkv.dtype.element_ty), live)
    tl.store(to + D // 2 + d, right.to(qkv.dtype.element_ty), live)


@triton.jit(do_not_specialize=["base", "layer"])
def _image_store(
    kv, base, address, tokens, first, image, positions, cos, sin, layer, G, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """Takes BLOCK heads of one visual token: keys are rotated, values copied, into the layer's place of its image."""
    _wait(HOPPER)
    row = tl.program_id(0).to(tl.int64)
    which, at = tl.load(image + row), tl.load(positions + row) * D
    token, size = row - tl.load(first + which), tl.load(tokens + which)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    live = head < 2 * G
    left, right = _rotated(kv + row * 2 * G * D, cos + at, sin + at, head * D, live, head < G, D, HALF)
    to = _at(kv, base, tl.load(address + which)) + ((layer * 2 * G + head) * size + token) * D
    d = tl.arange(0, HALF)[None, :]
    live = live & (d < D // 2)
    tl.store(to + d, left.to(kv.dtype.element_ty), live)
    tl.store(to + D // 2 + d, right.to(kv.dtype.element_ty), live)


@triton.jit
def _at(anchor, base, address):
    """Returns a pointer to an address in elements, counted from a tensor's own (`base`). The compiler knows a tensor's
    alignment but not that of a bare number, which it would read and write value by value."""
    return anchor + tl.multiple_of(address - base, 8)


@triton.jit
def _round(q, k, v, seen, best, total, acc, scale):
    """Returns the running softmax (largest score, sum of weights, weighted values) with one block of keys more, in
    powers of two."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    weight, fade = tl.exp2(scores - base[:, None]), tl.exp2(best - base)
    acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return top, total * fade + tl.sum(weight, 1), acc


@triton.jit(do_not_specialize=["rows", "table_stride"])
def _text_attention(
    q, pool, tiles, table, limit, out, lse, q_stride, table_stride, rows, scale, H, G, D: tl.constexpr,
    DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PARTIAL: tl.constexpr,
    HOPPER: tl.constexpr,
):  # fmt: skip
    """Computes one head's attention of one tile over one of SPLITS parts of its prompt's text keys.

    `tiles` [T, 3]: first row, number of rows, batch slot. `table` [batch slots, table_stride]: K/V index of each token
    of the prompt. `limit` [rows]: the last key that a row sees; the tile reads keys up to the largest. PARTIAL: `out`
    [SPLITS, rows, H, D] is float32 and comes with its LSE in powers of two; a part without any visible key gets LSE
    -inf and zeros. Otherwise SPLITS is 1 and `out` [rows, H, D] is final. Padding tiles have no rows.
    """
    head, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, count = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1)
    table += tl.load(tiles + tile * 3 + 2) * table_stride
    group = head // (H // G)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, DP)
    row, live = start + m, m < count
    last = tl.load(limit + row, live, -1)
    keys = tl.max(last, 0) + 1
    share = tl.cdiv(tl.cdiv(keys, BLOCK_N), SPLITS) * BLOCK_N
    _wait(HOPPER)
    if count == 0:
        return
    inside = live[:, None] & (d < D)[None, :]
    query = tl.load(q + row[:, None] * q_stride + head * D + d[None, :], inside, 0.0)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total, acc = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, DP], tl.float32)
    for at in range(split * share, tl.minimum(keys, (split + 1) * share), BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        kv_index = tl.load(table + n, n < keys, 0)
        k_at = pool + kv_index[:, None] * 2 * G * D + group * D + d[None, :]
        exists = (n < keys)[:, None] & (d < D)[None, :]
        k, v = tl.load(k_at, exists, 0.0), tl.load(k_at + G * D, exists, 0.0)
        best, total, acc = _round(query, k, v, n[None, :] <= last[:, None], best, total, acc, scale)
    to = out + ((split * rows + row) * H + head)[:, None] * D + d[None, :]
    if PARTIAL:
        tl.store(lse + (split * rows + row) * H + head, best + tl.log2(total), live)
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    else:
        acc = acc / total[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["base", "layer"])
def _image_attention(
    q, anchor, base, items, image_rows, out, lse, q_stride, layer, scale, H, G, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """Computes one head's partial results of one item, in float32 with their LSE in powers of two. `items` [I, 6] and
    `image_rows` [R] are those of work.ImageWork. Padding items have no rows."""
    head, item = tl.program_id(0), items + tl.program_id(1) * 6
    tokens, low, high = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    first, count = tl.load(item + 4), tl.load(item + 5)
    k_at = _at(anchor, base, tl.load(item)) + (layer * 2 * G + head // (H // G)) * tokens * D
    v_at = k_at + G * tokens * D
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, DP)
    live = m < count
    row = tl.load(image_rows + first + m, live, 0)
    _wait(HOPPER)
    if count == 0:
        return
    inside = live[:, None] & (d < D)[None, :]
    query = tl.load(q + row[:, None] * q_stride + head * D + d[None, :], inside, 0.0)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total, acc = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, DP], tl.float32)
    for at in range(low, high, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        exists = (n < high)[:, None] & (d < D)[None, :]
        token = n[:, None] * D + d[None, :]
        k, v = tl.load(k_at + token, exists, 0.0), tl.load(v_at + token, exists, 0.0)
        best, total, acc = _round(query, k, v, (n < high)[None, :], best, total, acc, scale)
    part = (first + m) * H + head
    tl.store(lse + part, best + tl.log2(total), live)
    tl.store(out + part[:, None] * D + d[None, :], acc / total[:, None], inside)


@triton.jit(do_not_specialize=["first", "rows"])
def _merge(
    text, text_lse, image, image_lse, starts, parts, out, first, rows, H, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, IMAGES: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """Merges the partial results of one row (counted from `first`) and BLOCK heads: SPLITS over text, and where IMAGES
    those over images that `starts` and `parts` of work.ImageWork name."""
    _wait(HOPPER)
    row = first + tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DP)[None, :]
    live = head < H
    inside = live[:, None] & (d < D)
    best, total = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, DP], tl.float32)
    for split in range(SPLITS):
        at = (split * rows + row) * H + head
        best, total, acc = _add_part(text, text_lse, at, d, live, inside, best, total, acc, D)
    if IMAGES:
        for part in range(tl.load(starts + row), tl.load(starts + row + 1)):
            at = tl.load(parts + part) * H + head
            best, total, acc = _add_part(image, image_lse, at, d, live, inside, best, total, acc, D)
    to = out + (row * H + head)[:, None] * D + d
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), inside)


@triton.jit
def _add_part(part, lse, at, d, live, inside, best, total, acc, D: tl.constexpr):
    """Returns the running merge (largest LSE, sum of weights, weighted results) with one partial result more."""
    new = tl.load(lse + at, live, float("-inf"))
    top = tl.maximum(best, new)
    base = tl.where(top == float("-inf"), 0.0, top)
    fade, weight = tl.exp2(best - base), tl.exp2(new - base)
    acc = acc * fade[:, None] + tl.load(part + at[:, None] * D + d, inside, 0.0) * weight[:, None]
    return top, total * fade + weight, acc
