"""On a GPU: every kernel path in float32 is the CPU's function, and in half precision no worse than mask."""

import pytest
import torch

from tests import plans
from tests.builders import LAYOUTS, WIDTH, assert_close, batch, tiny_model
from vica.kernels.attention import KERNELS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HALVES = [torch.bfloat16, torch.float16]


def on_gpu(inputs: dict, dtype: torch.dtype) -> dict:
    features = inputs["image_features"]
    moved = {k: v.cuda() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    return {**moved, "image_features": [x.to("cuda", dtype) for x in features] if features else None}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_float32_equals_the_cpu(layout, side):
    inputs = batch(LAYOUTS[layout], side)
    model = tiny_model()
    want = model(**inputs).logits
    model.cuda()
    for variant in ("mask", "accel"):
        model.set_variant(variant)
        assert_close(model(**on_gpu(inputs, torch.float32)).logits.cpu(), want, what=variant)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_half_precision_kernels(layout, dtype, kv_heads):
    """Prefill, one decode step and a second turn: each kernel's error is of mask's own size."""
    inputs = batch(LAYOUTS[layout], "left")
    model = tiny_model(text_config=dict(num_key_value_heads=kv_heads))
    rows = len(inputs["input_ids"])
    later = [torch.full((rows, 1), 5), torch.arange(7, 10).expand(rows, 3)]

    def talk(model, inputs, later):
        out = model(**inputs, use_cache=True)
        logits, mask = [out.logits], inputs["attention_mask"]
        for ids in later:
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            out = model(ids, attention_mask=mask, past_key_values=out.past_key_values)
            logits.append(out.logits)
        return torch.cat(logits, 1).float().cpu()

    want = talk(model.to(dtype).float(), inputs, later)
    model.to("cuda", dtype)
    gpu_inputs, gpu_later = on_gpu(inputs, dtype), [x.cuda() for x in later]
    model.set_variant("mask")
    own = (talk(model, gpu_inputs, gpu_later) - want).norm() / want.norm()
    model.set_variant("accel")
    for kernel in available():
        model.model.kernel_name = kernel
        error = (talk(model, gpu_inputs, gpu_later) - want).norm() / want.norm()
        assert error <= 1.5 * own + 1e-4, f"{kernel}: {error:.2e}, mask {own:.2e}"  # tiny sums scatter more than 7B's


@pytest.mark.parametrize("kernel", [None, "varlen", "sdpa"])
def test_gradients_flow_through_every_kernel(kernel):
    inputs = batch(LAYOUTS["unequal numbers of images"], "right")

    def gradient(model, inputs, variant):
        model.set_variant(variant)
        features = [x.detach().requires_grad_() for x in inputs["image_features"]]
        model(**{**inputs, "image_features": features}, labels=inputs["input_ids"]).loss.backward()
        q = model.model.layers[0].self_attn.q_proj.weight.grad
        found = torch.cat([q.flatten(), *(x.grad.flatten() for x in features)]).float().cpu()
        model.zero_grad()
        return found

    model = tiny_model().to(torch.bfloat16).float()
    want = gradient(model, inputs, "mask")
    model.to("cuda", torch.bfloat16)
    own = (gradient(model, on_gpu(inputs, torch.bfloat16), "mask") - want).norm() / want.norm()
    model.model.kernel_name = kernel
    error = (gradient(model, on_gpu(inputs, torch.bfloat16), "accel") - want).norm() / want.norm()
    assert error <= 1.5 * own, f"{error:.2e}, mask {own:.2e}"


def available() -> list[str]:
    from importlib.util import find_spec

    return [k for k in KERNELS if k != "flash_attn" or find_spec("flash_attn")]


def test_the_default_path_of_a_ragged_batch_makes_no_dense_mask(monkeypatch):
    """[T, T + V] masks would be built by the padded kernels only."""
    import vica.kernels.attention as attention

    monkeypatch.setattr(attention, "PaddedRuns", None)
    model = tiny_model().to("cuda", torch.bfloat16)
    with torch.no_grad():
        logits = model(**on_gpu(batch(LAYOUTS["unequal numbers of images"], "left"), torch.bfloat16)).logits
    assert torch.isfinite(logits).all() and model.config.text_config.hidden_size == WIDTH


PLANS = {
    "fastv": plans.fastv(4, 2, 0.5, "round"),
    "pyramiddrop": plans.pyramiddrop(4, [1, 2, 3], [0.7, 0.5, 0.2]),
    "shortv": plans.shortv(4, [0, 2]),
    "vtw": plans.vtw(4, 2, "renumber"),
    "visipruner": plans.visipruner_shallow(4, 2),
    "vica and pyramiddrop": plans.vica_pyramiddrop(4, [0, 2], True, [2], [0.5]),
}
ASKED = ["unequal numbers of images", "two images", "text beside image", "ragged lengths"]


@pytest.mark.parametrize("layout", ASKED)
@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_plans_equal_the_cpu(plan, layout):
    """In float32, by accel and mask, with a decode step."""
    inputs, model = batch(LAYOUTS[layout], "left"), tiny_model()
    model.config.plan = PLANS[plan]
    step = torch.full((len(inputs["input_ids"]), 1), 5)

    def talk(inputs, step):
        out = model(**inputs, use_cache=True)
        return torch.cat([out.logits, model(step, past_key_values=out.past_key_values).logits], 1).cpu()

    want = talk(inputs, step)
    model.cuda()
    for model.config.variant in ("mask", "accel"):
        assert_close(talk(on_gpu(inputs, torch.float32), step.cuda()), want, 1e-4, model.config.variant)


@pytest.mark.parametrize("layout", ASKED)
@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_no_drop_waits_for_the_device(plan, layout):
    """Ids and padding lie on the host; everything else is queued."""
    inputs, model = batch(LAYOUTS[layout], "left"), tiny_model().to("cuda", torch.bfloat16)
    model.config.plan = PLANS[plan]
    inputs["image_features"] = [x.to("cuda", torch.bfloat16) for x in inputs["image_features"]]
    model.model(**inputs)  # compiles kernels, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        hidden, _ = model.model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(hidden).all()
