"""On a GPU: each Triton kernel is the torch operation it stands for, and the engine's float32 tokens are generate's."""

import numpy as np
import pytest
import torch

from tests.builders import Row, assert_close, image, tiny_model
from vica.engine import Engine, Request
from vica.kernels.layer_torch import Shape, TorchOps
from vica.kernels.transfer import integers_to_device
from vica.kernels.work import Step, block_of, cut_tiles, image_arrays, image_places
from vica.testing import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [Shape(*x, "silu") for x in ((4, 4, 64, 1e-5), (4, 2, 128, 1e-5), (6, 2, 40, 1e-6), (2, 2, 256, 1e-5))]
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DEVICE = torch.device("cuda")


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s.heads}/{s.kv_heads}x{s.head_dim}")
def ops(request):
    from vica.kernels.layer_triton import CudaOps

    torch.manual_seed(0)
    angle = torch.rand(64, request.param.head_dim // 2, device=DEVICE) * 6
    cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
    return CudaOps(request.param, cos, sin), TorchOps(request.param, cos, sin)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(got, want, dtype):
    error = (got.float() - want.float()).norm() / want.float().norm()
    assert error < DTYPES[dtype], f"{error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 32, 33, 70])
def test_products(ops, rows, dtype):
    ours, plain = ops
    width, size = 512, 11 * 256  # one multiple of 1024 and one that is not, among 512, 2816, 1024
    x, narrow, wide = (
        random(rows, width, dtype=dtype),
        random(size, width, dtype=dtype),
        random(1024, size, dtype=dtype),
    )
    norm = 1 + 0.3 * random(width, dtype=dtype)
    middle, hidden = random(rows, size, dtype=dtype), random(rows, 1024, dtype=dtype)
    close(ours.linear(x, narrow), plain.linear(x, narrow), dtype)
    close(ours.norm(x, narrow[0]), plain.norm(x, narrow[0]), dtype)
    close(ours.norm_linear(x, norm, narrow), plain.norm_linear(x, norm, narrow), dtype)
    close(ours.norm_gated(x, norm, narrow), plain.norm_gated(x, norm, narrow), dtype)
    got, want = hidden.clone(), hidden.clone()
    ours.add_linear(got, middle, wide)
    plain.add_linear(want, middle, wide)
    close(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_and_stores(ops, dtype):
    ours, plain = ops
    s = plain.shape
    qkv = random(9, s.heads + 2 * s.kv_heads, s.head_dim, dtype=dtype)
    positions, kv_index = torch.randint(0, 64, (9,), device=DEVICE), torch.randperm(20, device=DEVICE)[:9]
    pools = [random(20, 2, s.kv_heads, s.head_dim, dtype=dtype)]
    pools.append(pools[0].clone())
    want = plain.rope_store(qkv.clone(), positions, kv_index, pools[1])
    close(ours.rope_store(qkv.clone(), positions, kv_index, pools[0]), want, dtype)
    close(pools[0], pools[1], dtype)

    images = [
        [torch.zeros(2, 2, s.kv_heads, n, s.head_dim, dtype=dtype, device=DEVICE) for n in (5, 1, 8)] for _ in "ab"
    ]
    kv = random(14, 2, s.kv_heads, s.head_dim, dtype=dtype)
    for op, some in zip(ops, images):
        op.image_store(kv, 1, integers_to_device(image_places(some, [3, 0, 40]), DEVICE), some)
    for got, want in zip(*images):
        assert not got[0].any(), "another layer's place"
        close(got[1], want[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("with_images", [False, True])
def test_attention(ops, with_images, frozen, splits, dtype):
    """Ragged tiles, rows with no, one and two images, shared images, leading rows without queries."""
    ours, plain = ops
    s, lengths = plain.shape, (3, 150, 70, 1)
    firsts = np.cumsum([0, *lengths])
    tiles = np.array([t for slot, n in enumerate(lengths) for t in cut_tiles(firsts[slot], n, slot)])
    limit = np.concatenate([np.arange(n) + 5 * slot for slot, n in enumerate(lengths)])
    t = integers_to_device(dict(tiles=tiles, limit=limit), DEVICE)
    kv_table = torch.randperm(4 * 160, device=DEVICE).view(4, 160)
    rows = int(firsts[-1])
    q = random(rows, s.heads + 2 * s.kv_heads, s.head_dim, dtype=dtype)[:, : s.heads]
    pool = random(4 * 160, 2, s.kv_heads, s.head_dim, dtype=dtype)
    kvs = [random(3, 2, s.kv_heads, n, s.head_dim, dtype=dtype) for n in (130, 9)]
    seen = [(kvs[0], np.arange(4, 150)), (kvs[1], np.arange(100, 160)), (kvs[0], np.arange(200, rows))]
    images = image_arrays(seen, rows, 7) if with_images else None
    work = None if images is None else images.on_device(integers_to_device(images.arrays, DEVICE))
    apart = dict(frozen_rows=3, frozen_tiles=1) if frozen else {}
    block = block_of(tiles[:, 1])
    step = Step(t["limit"], t["limit"], t["limit"], t["tiles"], kv_table, block, splits, images=work, **apart)
    plain_step = Step(t["limit"], t["limit"], t["limit"], t["tiles"], kv_table, block, images=work, **apart)
    want = plain.attend(q, pool, plain_step, frozen, 2)
    close(ours.attend(q, pool, step, frozen, 2), want, dtype)


@pytest.mark.parametrize("variant", ["accel", "dense"])
@pytest.mark.parametrize("cuda_graphs", [True, False])
@torch.inference_mode()
def test_float32_tokens_equal_generate(variant, cuda_graphs):
    """Three times the same, as a captured pass runs plainly first, then is captured, then replayed."""
    model = tiny_model(variant=variant, text_config=dict(max_position_embeddings=256)).cuda()
    rows = [Row((3, image(5), 4)), Row((9,), 1), Row((image(7), 2, image(3), 3), 2), Row((3, image(5), 6), 3)] * 3
    want = []
    for row in rows:
        features = [x.cuda() for x in row.images] or None
        ids = torch.tensor([row.ids], device=DEVICE)
        out = model.generate(ids, image_features=features, max_new_tokens=9, do_sample=False, pad_token_id=0)
        want.append(out[0, len(row.ids) :].tolist())
    engine = Engine(model, max_batch=5, kv_bytes=2**24, image_memory_bytes=2**24, cuda_graphs=cuda_graphs)
    for _ in range(3):
        results = engine.generate([Request(row.ids, list(row.images), max_new_tokens=9) for row in rows])
        assert [r.tokens for r in results] == want, [r.error for r in results]


@pytest.mark.parametrize("count", [1, 3, 9])
@torch.inference_mode()
def test_the_tower_and_its_features(count):
    model, _ = build()
    pixels = torch.randn(count, 3, 336, 336)
    want = model.model.encode_images(pixels)
    engine = Engine(model.cuda(), kv_bytes=2**24, image_memory_bytes=2**24)
    for _ in range(3):
        assert_close(torch.stack(engine.runner.encode(pixels.numpy())).cpu(), want, 1e-4)
