"""layer_torch.py on CUDA: Triton kernels for what lies between the large matrix products, which are cuBLAS's.

Each does a whole step of a layer in one pass over its data: norms, rotary with the K/V's way to their slots, attention
over slots and over images, the gate. Few rows are multiplied by kernels of their own, which read weights at nearly the
memory's full rate. On Hopper and later, each kernel is launched while the one before still runs (programmatic
dependent launch).
"""

import torch
import triton
import triton.language as tl

from .layer_torch import TorchOps
from .work import ImageWork, Step, key_blocks

HEADS = 8  # that one program of a rotary or merging kernel takes
FEW_ROWS = 32  # up to here our products are faster than cuBLAS's
LOG2E = 1.4426950408889634  # partial results are weighed in powers of two, which the hardware has


class CudaOps(TorchOps):
    def __init__(self, shape, cos, sin):
        super().__init__(shape, cos, sin)
        self.hopper = torch.cuda.get_device_capability(cos.device)[0] >= 9
        self.padded_dim = max(16, triton.next_power_of_2(shape.head_dim))  # products take no less
        self.arrived = torch.zeros(128, dtype=torch.int32, device=cos.device)  # programs of each block of a product
        self.half = triton.next_power_of_2(shape.head_dim // 2)

    def norm(self, x, weight):
        out, width = torch.empty_like(x), x.shape[1]
        _rms_norm[(len(x),)](
            x, weight, out, self.shape.eps, width, triton.next_power_of_2(width), self.hopper, num_warps=8,
            launch_pdl=self.hopper,
        )  # fmt: skip
        return out

    def linear(self, x, weight, bias=None):
        if bias is not None or not self._few(x, weight):
            return super().linear(x, weight, bias)
        return self._multiply(x, weight, torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device), add=False)

    def add_linear(self, hidden, x, weight, bias=None):
        if bias is not None or not self._few(x, weight):
            super().add_linear(hidden, x, weight, bias)
        else:
            self._multiply(x, weight, hidden, add=True)

    def norm_gated(self, x, norm, weight, bias=None):
        if self.shape.activation != "silu":
            return super().norm_gated(x, norm, weight, bias)
        size, x = len(weight) // 2, self.norm(x, norm)
        out = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
        if len(x) == 1 and bias is None and self._few(x, weight):
            return self._multiply_row(x, weight, out, gated=True)
        both = self.linear(x, weight, bias)
        _gate[(len(x), triton.cdiv(size, 1024))](both, out, size, 1024, self.hopper, launch_pdl=self.hopper)
        return out

    def _few(self, x, weight) -> bool:
        even = weight.shape[0] % 64 == 0 and weight.shape[1] % 256 == 0
        return len(x) <= FEW_ROWS and even and x.is_contiguous()

    def _multiply(self, x, weight, out, add: bool):
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

    def _multiply_row(self, x, weight, out, add: bool = False, gated: bool = False):
        columns = weight.shape[1]
        # the fastest found on an H200: programs of one warp where the weight is narrow
        step, warps = (1024, 4 if gated else 8) if out.shape[1] >= 8192 and columns % 1024 == 0 else (256, 1)
        _multiply_row[(out.shape[1],)](
            x, weight, out, out.shape[1], columns, step, add, gated, self.hopper, num_warps=warps,
            launch_pdl=self.hopper,
        )  # fmt: skip
        return out

    def rope_store(self, qkv, pos, slot, pool):
        s = self.shape
        _rope_store[(len(qkv), triton.cdiv(s.heads + 2 * s.kv_heads, HEADS))](
            qkv, pool, self.cos, self.sin, pos, slot, qkv.stride(0), s.heads, s.kv_heads, s.head_dim, self.half, HEADS,
            self.hopper, launch_pdl=self.hopper,
        )  # fmt: skip
        return qkv[:, : s.heads]

    def image_store(self, kv, layer, place, images):
        s = self.shape
        _image_store[(len(kv), triton.cdiv(2 * s.kv_heads, HEADS))](
            kv, _address(kv), place["address"], place["tokens"], place["first"], place["image"], place["pos"], self.cos,
            self.sin, layer, s.kv_heads, s.head_dim, self.half, HEADS, self.hopper, launch_pdl=self.hopper,
        )  # fmt: skip

    def attend(self, q, pool, step: Step, frozen: bool, image_layer: int | None):
        images = step.images if image_layer is not None else None
        tiles, first = (step.tiles[step.frozen_tiles :], step.frozen_rows) if frozen else (step.tiles, 0)
        mixed = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        if images is None and step.splits == 1:
            self._text(q, pool, tiles, step, mixed, None)
            return mixed[first:]
        text = self._text(q, pool, tiles, step, *self._partials(q, step.splits * len(q)))
        image = self._image(q, pool, images, image_layer) if images is not None else text
        grid = (len(q) - first, triton.cdiv(q.shape[1], HEADS))
        starts, parts = (images.starts, images.parts) if images is not None else (step.limit, step.limit)
        _merge[grid](
            *text, *image, starts, parts, mixed, first, len(q), q.shape[1], q.shape[2],
            self.padded_dim, HEADS, step.splits, images is not None, self.hopper,
            launch_pdl=self.hopper,
        )  # fmt: skip
        return mixed[first:]

    def _partials(self, q, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (count, *q.shape[1:])
        return (
            torch.empty(shape, dtype=torch.float32, device=q.device),
            torch.empty(shape[:2], dtype=torch.float32, device=q.device),
        )

    def _text(self, q, pool, tiles, step: Step, out, lse):
        s, rows = self.shape, max(16, step.block)
        keys, stages = key_blocks(rows, q.element_size() * self.padded_dim, 2)
        _text_attention[(s.heads, len(tiles), step.splits)](
            q, pool, tiles, step.table, step.limit, out, out if lse is None else lse, q.stride(0), step.table.stride(0),
            len(q), s.scale * LOG2E, s.heads, s.kv_heads, s.head_dim, self.padded_dim, rows, keys,
            step.splits, lse is not None, self.hopper, num_warps=2 if rows == 16 else 4, num_stages=stages,
            launch_pdl=self.hopper,
        )  # fmt: skip
        return out, lse

    def _image(self, q, pool, images: ImageWork, layer: int):
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
    return x.data_ptr() // x.element_size()


# The kernel before may still be running, those before it have finished, as each releases its successor only after its
# own wait. So before this nothing is read that the kernel before writes, and nothing is written.
@triton.jit
def _wait(HOPPER: tl.constexpr):
    if HOPPER:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _multiply_row(
    x, weight, out, N, K: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, HOPPER: tl.constexpr
):
    """One row times a weight. A program takes one of the weight's rows; GATED: one of either half's."""
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
    """A program takes BN rows of the weight, over one of SPLITS parts of its columns: narrow weights alone would not
    fill the device. The program that comes last adds the parts up, always in their order."""
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
        tl.debug_barrier()  # all threads have stored before one says so
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
    _wait(HOPPER)
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + row * 2 * size + n, n < size, 0.0).to(tl.float32)
    up = tl.load(both + row * 2 * size + size + n, n < size, 0.0).to(tl.float32)
    tl.store(out + row * size + n, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), n < size)


@triton.jit
def _rms_norm(x, weight, out, eps, width, BLOCK: tl.constexpr, HOPPER: tl.constexpr):
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
    """Both halves of the heads at `where` [heads, 1], rotated where `turn` [heads, 1]."""
    d = tl.arange(0, HALF)[None, :]
    inside = d < D // 2
    left = tl.load(x + where + d, live & inside, 0.0).to(tl.float32)
    right = tl.load(x + where + D // 2 + d, live & inside, 0.0).to(tl.float32)
    c, s = tl.load(cos + d, inside, 0.0), tl.load(sin + d, inside, 0.0)
    return tl.where(turn, left * c - right * s, left), tl.where(turn, right * c + left * s, right)


@triton.jit
def _rope_store(
    qkv, pool, cos, sin, pos, slot, stride, H, G, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    HOPPER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    live = head < H + 2 * G
    at, place = tl.load(pos + row) * D, tl.load(slot + row)
    base = qkv + row * stride
    _wait(HOPPER)
    left, right = _rotated(base, cos + at, sin + at, head * D, live, head < H + G, D, HALF)
    # queries stay where they are; keys, then values, lie side by side in a slot
    to = tl.where(head < H, base + head * D, pool + place * 2 * G * D + (head - H) * D)
    d = tl.arange(0, HALF)[None, :]
    live = live & (d < D // 2)
    tl.store(to + d, left.to(qkv.dtype.element_ty), live)
    tl.store(to + D // 2 + d, right.to(qkv.dtype.element_ty), live)


@triton.jit(do_not_specialize=["base", "layer"])
def _image_store(
    kv, base, address, tokens, first, image, pos, cos, sin, layer, G, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    _wait(HOPPER)
    row = tl.program_id(0).to(tl.int64)
    which, at = tl.load(image + row), tl.load(pos + row) * D
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
    """A pointer from an address in elements. It is counted from a tensor's own, whose alignment the compiler knows:
    a bare number's it does not, and it would read and write value by value."""
    return anchor + tl.multiple_of(address - base, 8)


@triton.jit
def _round(q, k, v, seen, best, total, acc, scale):
    """One block of keys in the running softmax, in powers of two."""
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
        place = tl.load(table + n, n < keys, 0)
        here = pool + place[:, None] * 2 * G * D + group * D + d[None, :]
        known = (n < keys)[:, None] & (d < D)[None, :]
        k, v = tl.load(here, known, 0.0), tl.load(here + G * D, known, 0.0)
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
        known = (n < high)[:, None] & (d < D)[None, :]
        here = n[:, None] * D + d[None, :]
        k, v = tl.load(k_at + here, known, 0.0), tl.load(v_at + here, known, 0.0)
        best, total, acc = _round(query, k, v, (n < high)[None, :], best, total, acc, scale)
    part = (first + m) * H + head
    tl.store(lse + part, best + tl.log2(total), live)
    tl.store(out + part[:, None] * D + d[None, :], acc / total[:, None], inside)


@triton.jit(do_not_specialize=["first", "rows"])
def _merge(
    text, text_lse, image, image_lse, starts, parts, out, first, rows, H, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, IMAGES: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
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
        best, total, acc = _weigh(text, text_lse, at, d, live, inside, best, total, acc, D)
    if IMAGES:
        for place in range(tl.load(starts + row), tl.load(starts + row + 1)):
            at = tl.load(parts + place) * H + head
            best, total, acc = _weigh(image, image_lse, at, d, live, inside, best, total, acc, D)
    to = out + (row * H + head)[:, None] * D + d
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), inside)


@triton.jit
def _weigh(part, lse, at, d, live, inside, best, total, acc, D: tl.constexpr):
    new = tl.load(lse + at, live, float("-inf"))
    top = tl.maximum(best, new)
    base = tl.where(top == float("-inf"), 0.0, top)
    fade, weight = tl.exp2(best - base), tl.exp2(new - base)
    acc = acc * fade[:, None] + tl.load(part + at[:, None] * D + d, inside, 0.0) * weight[:, None]
    return top, total * fade + weight, acc
