"""On a GPU: the fused norm, rotary and gate are the plain ones, forward and backward."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 40), (1, 4096), (700, 2560), (2, 5, 96)]


def run(function, *inputs):
    """The output, and the gradients of the inputs for one fixed gradient of it."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*inputs)
    torch.manual_seed(1)
    out.backward(torch.randn_like(out))
    return out.detach(), [x.grad for x in inputs]


def compare(fused, plain, inputs):
    """`fused` may be as wrong as `plain` in the inputs' type is, float64 being right."""
    out, gradients = run(fused, *inputs)
    want, want_gradients = run(plain, *inputs)
    exact, exact_gradients = run(plain, *[x.double() for x in inputs])
    for ours, theirs, right in zip([out, *gradients], [want, *want_gradients], [exact, *exact_gradients]):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        error, allowed = (ours - right).norm(), (theirs - right).norm()
        assert error <= 1.1 * allowed + 1e-6 * right.norm(), f"{error:.2e}, plain {allowed:.2e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(shape, dtype):
    from vica.kernels.pointwise_triton import rms_norm

    def plain(x, weight):
        scaled = x * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5).to(x.dtype)
        norm = LlamaRMSNorm(x.shape[-1], eps=1e-5)
        norm.weight = torch.nn.Parameter(weight)
        return weight * scaled if x.dtype == torch.float64 else torch.func.functional_call(norm, {"weight": weight}, x)

    x = 3 * torch.randn(shape, device="cuda", dtype=dtype)
    weight = torch.rand(shape[-1], device="cuda", dtype=dtype) + 0.5
    compare(lambda x, w: rms_norm(x, w, 1e-5), plain, [x, weight])


@pytest.mark.parametrize("lead", [(5,), (2, 7)], ids=str)
@pytest.mark.parametrize("heads, size", [(4, 64), (32, 128), (5, 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary(lead, heads, size, dtype):
    from vica.kernels.pointwise_triton import rotate_pairs

    angles = torch.rand(*lead, size // 2, device="cuda").repeat(*[1] * len(lead), 2) * 40

    def plain(x):
        cos, sin = angles.cos().to(x.dtype).unsqueeze(-2), angles.sin().to(x.dtype).unsqueeze(-2)
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), dim=-1) * sin

    x = torch.randn(*lead, heads, size, device="cuda", dtype=dtype)
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    compare(lambda x: rotate_pairs(x, *tables), plain, [x])


@pytest.mark.parametrize("shape", [(3, 40), (700, 11008), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate(shape, dtype):
    from vica.kernels.pointwise_triton import silu_gate

    gate, up = 4 * torch.randn(2, *shape, device="cuda", dtype=dtype)
    compare(silu_gate, lambda g, u: torch.nn.functional.silu(g) * u, [gate, up])


def test_a_frozen_norm_makes_no_gradient_for_its_weight():
    from vica.kernels.pointwise_triton import rms_norm

    x, weight = torch.randn(4, 64, device="cuda", requires_grad=True), torch.ones(64, device="cuda")
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None and weight.grad is None
