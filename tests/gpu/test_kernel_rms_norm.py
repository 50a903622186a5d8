"""RMSNorm's Triton kernels on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from numerics import BEHAVIOURS, compare, compiles_inductor, eager_rms_norm, strided, upstream_like, wide

from rewriter.kernels.rms_norm import add_rms_norm, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def both(**options):
    return lambda x, w: rms_norm(x, w, 1e-6, **options), lambda x, w: eager_rms_norm(x, w, 1e-6, **options)


def both_added(**options):
    def old(x, r, w):
        return eager_rms_norm(x + r, w, 1e-6, **options), x + r

    return lambda x, r, w: add_rms_norm(x, r, w, 1e-6, **options), old


def tensor(*shape, **options):
    return strided(*shape, device="cuda", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"round_before_weight": True}])
@pytest.mark.parametrize("width", [1, 63, 128, 1536, 4096, 5001, 8192, 16385, 32768])
def test_numbers(dtype, options, width):
    x, w = tensor(3, 257, width, dtype=dtype), tensor(width, dtype=dtype, seed=2)
    compare(*both(**options), [x, w])
    compare(*both(), [x, None])


@pytest.mark.parametrize("x, residual", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
@pytest.mark.parametrize("options", [{}, {"offset": 1.0, "round_before_weight": True}])
@pytest.mark.parametrize("width", [1, 63, 1536, 8192, 16385])
def test_sum(x, residual, options, width):
    inputs = [tensor(257, width, dtype=getattr(torch, x)), tensor(257, width, dtype=getattr(torch, residual), seed=3)]
    compare(*both_added(**options), [*inputs, tensor(width, seed=2)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 1000, 5001, 32768])
def test_scale_and_floor(dtype, width):
    """torch.nn.functional.normalize with rows of norm 0, below the floor and around it, alone and of a sum."""
    x, root, floor = tensor(257, width, dtype=dtype, grad=False), width**0.5, 0.5 * width**0.5
    x[0], x[1] = 0, x[1] * 1e-2
    options = dict(scale=1 / root, floor=floor / root)
    compare(
        lambda x: rms_norm(x, None, 0.0, **options), lambda x: F.normalize(x, dim=-1, eps=floor), [x.requires_grad_()]
    )
    compare(
        lambda x, r: add_rms_norm(x, r, None, 0.0, **options),
        lambda x, r: (F.normalize(x + r, dim=-1, eps=floor), x + r),
        [x, torch.zeros_like(x).requires_grad_()],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 1000, 5001, 32768])
def test_outside(dtype, width):
    """x / (rms(x) + outside) with rows of zeros, small and large ones, alone and of a sum."""
    x, w = tensor(257, width, dtype=dtype, grad=False), tensor(width, dtype=dtype, seed=2)
    x[0], x[1] = 0, x[1] * 1e-2

    def old(x, w):
        h, root = wide(x), x.shape[-1] ** 0.5
        return (h / (h.norm(2, -1, keepdim=True) / root + 0.5) * (1.0 + wide(w))).to(x.dtype)

    options = dict(offset=1.0, outside=0.5)
    compare(lambda x, w: rms_norm(x, w, 0.0, **options), old, [x.requires_grad_(), w])
    compare(
        lambda x, r, w: add_rms_norm(x, r, w, 0.0, **options),
        lambda x, r, w: (old(x + r, w), x + r),
        [x, torch.zeros_like(x).requires_grad_(), w],
    )


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_layouts(order, kind):
    x, w = tensor(2, 12, 333, 128, order=order, dtype=torch.bfloat16), tensor(128, dtype=torch.bfloat16, seed=2)
    compare(*both(offset=1.0), [x, w], kind=kind)
    compare(*both_added(offset=1.0), [x, tensor(2, 12, 333, 128, dtype=torch.bfloat16, seed=3), w], kind=kind)


def test_slice_of_a_packed_projection():
    packed = tensor(2, 333, 48 * 64, grad=False)
    q = packed[..., 1024:2048].view(2, 333, 16, 64).transpose(1, 2).requires_grad_()
    compare(*both(), [q, tensor(64, seed=2)])


def test_gradient_of_the_weight_is_bit_equal_on_repeat():
    x, w = tensor(8191, 1536, dtype=torch.bfloat16), tensor(1536, dtype=torch.bfloat16, seed=2)
    y = rms_norm(x, w, 1e-6)
    dy = upstream_like(y)
    first, *others = (torch.autograd.grad(y, w, dy, retain_graph=True)[0] for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


def test_offsets_pass_32_bits():
    rows, width = (1 << 31) // 4096 + 3, 4096
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    x[-2:] = tensor(2, width, dtype=torch.bfloat16, grad=False)
    x.requires_grad_()
    y = rms_norm(x, None, 1e-6)
    tail = x[-2:].detach().requires_grad_()
    expected = rms_norm(tail, None, 1e-6)
    assert torch.equal(y[-2:], expected)
    dy = upstream_like(expected)
    (expected_dx,) = torch.autograd.grad(expected, tail, dy)
    full = torch.zeros_like(y)
    full[-2:] = dy
    (dx,) = torch.autograd.grad(y, x, full)
    assert torch.equal(dx[-2:], expected_dx)


@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour(behaviour):
    def build(n):
        return [tensor(2, n, 3, 16, order=(0, 2, 1, 3)), tensor(16)]

    behaviour(lambda x, w: rms_norm(x, w, 1e-6), build)
    behaviour(lambda x, w: rms_norm(x, w, 0.0, outside=1e-8), build)


@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour_of_the_sum(behaviour):
    def build(n):
        return [tensor(2, n, 3, 16, order=(0, 2, 1, 3)), tensor(2, n, 3, 16, seed=3), tensor(16, seed=2)]

    behaviour(lambda x, r, w: add_rms_norm(x, r, w, 1e-6, scale=0.3, floor=0.5), build)
