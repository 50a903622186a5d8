"""GLU's Triton kernels, interpreted, on small odd shapes."""

import pytest
import torch
from numerics import compare, eager_glu, eager_glu_packed, fakes, strided

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers(dtype, activation):
    compare(*both(activation), [strided(3, 5, 33, dtype=dtype), strided(3, 5, 33, dtype=dtype, seed=2)])
    compare(*both_packed(activation), [strided(3, 5, 66, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamped(dtype):
    compare(*both(**CLAMPED), [strided(3, 5, 33, dtype=dtype), strided(3, 5, 33, dtype=dtype, seed=2)])
    for packing in PACKINGS:
        compare(*both_packed(**CLAMPED, **packing), [strided(3, 5, 66, dtype=dtype)])


@pytest.mark.parametrize("options", [{"alpha": 1.702}, {"limit": 0.5}, {"shift": -0.3}])
def test_each_option_alone(options):
    compare(*both(**options), [strided(4, 9), strided(4, 9, seed=2)])
    compare(*both(**options), [strided(4, 9, grad=False), strided(4, 9, seed=2)])
    compare(*both_packed(interleaved=True, **options), [strided(4, 18)])


@pytest.mark.parametrize("activation", ["relu", "relu2", "silu", "leaky_relu"])
def test_where_a_gradient_that_is_not_a_number_ends(activation):
    at = torch.tensor([-2.0, 0.0, 1.5])
    gate, up = at.clone().requires_grad_(), torch.full((3,), 2.0, requires_grad=True)
    gradients = [torch.autograd.grad(f(gate, up), (gate, up), torch.full((3,), torch.nan)) for f in both(activation)]
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())


def test_gradients_at_the_limit_are_those_of_clamp():
    at = torch.tensor([-2.5, -2.0, -1.5, 0.0, 1.5, 2.0, 2.5, float("nan")])
    gate, up = (t.flatten().clone().requires_grad_() for t in torch.meshgrid(at, at, indexing="ij"))
    new, old = both(limit=2.0)
    y, expected = new(gate, up), old(gate, up)
    torch.testing.assert_close(y, expected, equal_nan=True)
    gradients = [torch.autograd.grad(t.nan_to_num().sum(), (gate, up)) for t in (y, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        finite = theirs.isfinite()
        torch.testing.assert_close(mine[finite], theirs[finite])


@pytest.mark.parametrize("width", [1, 7, 64, 1025])
def test_widths(width):
    compare(*both("silu"), [strided(37, width), strided(37, width, seed=2)])
    compare(*both_packed("silu", interleaved=True), [strided(37, 2 * width)])


@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1)])
def test_layouts(order, kind):
    compare(*both("silu"), [strided(3, 4, 8, order=order), strided(3, 4, 8, seed=2)], kind=kind)
    compare(*both_packed("gelu", gate_first=False), [strided(3, 4, 8, order=order)], kind=kind)
    compare(*both_packed("gelu", interleaved=True), [strided(3, 4, 8, order=order)], kind=kind)


def test_slices_of_one_tensor():
    x = strided(2, 5, 24, grad=False)
    compare(*both("silu"), [x[..., :8].requires_grad_(), x[..., 16:].requires_grad_()])


def test_mixed_dtypes_and_one_frozen_half():
    gate, up = strided(4, 8, dtype=torch.bfloat16), strided(4, 8, seed=2)
    compare(*both("silu"), [gate, up], dtype=torch.bfloat16)
    compare(*both("silu"), [gate, up.detach()], dtype=torch.bfloat16)
    compare(*both("silu"), [gate.detach(), up], dtype=torch.bfloat16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_values(activation, dtype):
    gate = torch.tensor([[-1e4, -90.0, -20.0, -0.4, -1e-4, 0.0, 1e-4, 0.4, 20.0, 90.0, 1e4]], dtype=dtype)
    for column in gate.T:
        gate = column[None].clone().requires_grad_()
        new, old = both(activation)
        one, other = torch.ones_like(gate), torch.ones_like(gate)
        torch.testing.assert_close(new(gate, one), old(gate, other), rtol=1e-5, atol=1e-30)
        gradients = [torch.autograd.grad(f(gate, one).sum(), gate)[0] for f in (new, old)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (8,)])
def test_small_shapes(shape):
    compare(*both("silu"), [strided(*shape), strided(*shape, seed=2)])
    compare(*both_packed("silu"), [strided(*shape)])
    compare(*both_packed("silu", interleaved=True), [strided(*shape)], layout=0 not in shape)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays(activation):
    gate = torch.tensor([float("nan"), 1.0], requires_grad=True)
    y = glu(gate, torch.ones(2), activation=activation)
    y.sum().backward()
    constant = activation in ("identity", "leaky_relu")  # slopes 1 and 0.01 whatever x is, as in PyTorch
    assert y.isnan().tolist() == [True, False]
    assert gate.grad.isnan().tolist() == [not constant, False]


def test_layouts_are_those_of_the_fake_operator():
    fakes(lambda g, u: glu(g, u, activation="silu"), lambda n: [strided(2, n, 8, order=(1, 0, 2)), strided(2, n, 8)])
    for packing in PACKINGS:
        fakes(lambda x, p=packing: glu_packed(x, activation="silu", **p), lambda n: [strided(2, n, 8, order=(1, 0, 2))])
