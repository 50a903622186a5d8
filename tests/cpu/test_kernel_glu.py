"""GLU's reference operators against eager PyTorch and float64."""

import pytest
import torch
from numerics import BEHAVIOURS, EAGER_ACTIVATIONS, compare, eager_glu, eager_glu_packed, strided

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


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == set(EAGER_ACTIVATIONS)


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


@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1)])
def test_layouts(order, kind):
    compare(*both("silu"), [strided(3, 4, 8, order=order), strided(3, 4, 8, seed=2)], kind=kind)
    compare(*both_packed("gelu", gate_first=False), [strided(3, 4, 8, order=order)], kind=kind)
    compare(*both_packed("gelu", interleaved=True), [strided(3, 4, 8, order=order)], kind=kind)


def test_slices_of_one_tensor():
    x = strided(2, 5, 24, grad=False)
    compare(*both("silu"), [x[..., :8].requires_grad_(), x[..., 16:].requires_grad_()])


def test_mixed_dtypes_promote():
    gate, up = strided(4, 8, dtype=torch.bfloat16), strided(4, 8, seed=2)
    compare(*both("silu"), [gate, up], dtype=torch.bfloat16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(activation):
    """Far from 0 nothing overflows: values and gradients stay what eager gives."""
    gate = torch.tensor([[-1e4, -90.0, -20.0, -1e-4, 0.0, 1e-4, 20.0, 90.0, 1e4]]).requires_grad_()
    compare(*both(activation), [gate, torch.ones_like(gate).requires_grad_()])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (8,)])
def test_small_shapes(shape):
    compare(*both("silu"), [strided(*shape), strided(*shape, seed=2)])
    compare(*both_packed("silu"), [strided(*shape)])
    compare(*both_packed("silu", interleaved=True), [strided(*shape)], layout=0 not in shape)


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(*both("silu"), [strided(4, 8), strided(4, 8, seed=2)])


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour(behaviour):
    behaviour(lambda g, u: glu(g, u, activation="silu"), lambda n: [strided(2, n, 16), strided(2, n, 16, seed=2)])


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour_packed(behaviour):
    behaviour(lambda x: glu_packed(x, activation="gelu_tanh"), lambda n: [strided(2, n, 16)])
    behaviour(lambda x: glu_packed(x, interleaved=True, **CLAMPED), lambda n: [strided(2, n, 16)])


def test_operators_are_well_defined():
    g, u, dy = (strided(3, 8, grad=False, seed=s) for s in range(3))
    x = strided(3, 16, grad=False)
    ops = torch.ops.rewriter
    options = ("silu", 1.702, 2.0, 1.0)
    torch.library.opcheck(ops.glu_forward, (g, u, *options))
    torch.library.opcheck(ops.glu_backward, (dy, g, u, *options, True, False))
    torch.library.opcheck(ops.glu_packed_forward, (x, True, False, *options))
    torch.library.opcheck(ops.glu_packed_backward, (dy, x, False, True, *options))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="alpha is an option of silu"):
        glu(torch.zeros(2, 4), torch.zeros(2, 4), activation="gelu", alpha=1.702)
    with pytest.raises(ValueError, match="limit must be"):
        glu(torch.zeros(2, 4), torch.zeros(2, 4), activation="silu", limit=-1.0)
    with pytest.raises(ValueError, match="silu, gelu"):
        glu(torch.zeros(2, 4), torch.zeros(2, 4), activation="swish")
    with pytest.raises(ValueError, match="same shape"):
        glu(torch.zeros(2, 4), torch.zeros(4), activation="silu")
    with pytest.raises(ValueError, match="even"):
        glu_packed(torch.zeros(2, 5), activation="silu")
