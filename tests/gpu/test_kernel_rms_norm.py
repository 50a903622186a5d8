"""RMSNorm's Triton kernels on a GPU."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, compiles_inductor, eager_rms_norm, strided, upstream_like

from rewriter.kernels.rms_norm import rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def both(**options):
    return lambda x, w: rms_norm(x, w, 1e-6, **options), lambda x, w: eager_rms_norm(x, w, 1e-6, **options)


def tensor(*shape, **options):
    return strided(*shape, device="cuda", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"round_before_weight": True}])
@pytest.mark.parametrize("width", [1, 63, 128, 1536, 4096, 5001, 8192, 16385, 32768])
def test_numbers(dtype, options, width):
    x, w = tensor(3, 257, width, dtype=dtype), tensor(width, dtype=dtype, seed=2)
    compare(*both(**options), [x, w])
    compare(*both(), [x, None])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_layouts(order, kind):
    x, w = tensor(2, 12, 333, 128, order=order, dtype=torch.bfloat16), tensor(128, dtype=torch.bfloat16, seed=2)
    compare(*both(offset=1.0), [x, w], kind=kind)


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
    behaviour(lambda x, w: rms_norm(x, w, 1e-6), lambda n: [tensor(2, n, 3, 16, order=(0, 2, 1, 3)), tensor(16)])
