"""GLU's Triton kernels on a GPU."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, compiles_inductor, eager_glu, eager_glu_packed, strided

from rewriter.kernels.glu import ACTIVATIONS, glu, glu_packed

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


PACKINGS = [{"gate_first": first, "interleaved": turns} for first in (True, False) for turns in (True, False)]
CLAMPED = {"activation": "silu", "alpha": 1.702, "limit": 0.9, "shift": 1.0}  # gpt-oss, with a limit that often acts


def both(activation="silu", **options):
    options |= {"activation": activation}
    return lambda g, u: glu(g, u, **options), lambda g, u: eager_glu(g, u, **options)


def both_packed(activation="silu", **options):
    options |= {"activation": activation}
    return lambda x: glu_packed(x, **options), lambda x: eager_glu_packed(x, **options)


def tensor(*shape, **options):
    return strided(*shape, device="cuda", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 65, 1024, 8961])
def test_numbers(dtype, activation, width):
    compare(*both(activation), [tensor(3, 77, width, dtype=dtype), tensor(3, 77, width, dtype=dtype, seed=2)])
    compare(*both_packed(activation), [tensor(3, 77, 2 * width, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 65, 1024, 2880])
def test_clamped(dtype, width):
    compare(*both(**CLAMPED), [tensor(3, 77, width, dtype=dtype), tensor(3, 77, width, dtype=dtype, seed=2)])
    for packing in PACKINGS:
        compare(*both_packed(**CLAMPED, **packing), [tensor(3, 77, 2 * width, dtype=dtype)])


@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1)])
def test_layouts(order, kind):
    gate, up = tensor(3, 333, 514, order=order), tensor(3, 333, 514, seed=2)
    compare(*both("silu"), [gate, up], kind=kind)
    compare(*both_packed("gelu", gate_first=False), [gate], kind=kind)
    compare(*both_packed("gelu", interleaved=True), [gate], kind=kind)


def test_slices_of_one_tensor():
    x = tensor(2, 333, 3 * 512, dtype=torch.bfloat16, grad=False)
    compare(*both("silu"), [x[..., :512].requires_grad_(), x[..., 1024:].requires_grad_()])


@pytest.mark.parametrize("interleaved", [False, True])
def test_offsets_pass_32_bits(interleaved):
    x = torch.zeros((1 << 31) // 8192 + 3, 8192, dtype=torch.bfloat16, device="cuda")
    x[-2:] = tensor(2, 8192, dtype=torch.bfloat16, grad=False)
    tail = x[-2:].clone().requires_grad_()
    x.requires_grad_()
    y, expected = (glu_packed(t, activation="silu", interleaved=interleaved) for t in (x, tail))
    assert torch.equal(y[-2:], expected)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad[-2:], tail.grad)


@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour(behaviour):
    behaviour(lambda g, u: glu(g, u, activation="silu"), lambda n: [tensor(2, n, 16), tensor(2, n, 16, seed=2)])
    behaviour(lambda x: glu_packed(x, activation="gelu_tanh"), lambda n: [tensor(2, n, 16)])
    behaviour(lambda x: glu_packed(x, interleaved=True, **CLAMPED), lambda n: [tensor(2, n, 16)])
