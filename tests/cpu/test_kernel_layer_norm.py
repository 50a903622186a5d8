"""LayerNorm's reference operator against eager PyTorch and float64."""

import pytest
import torch
import torch.nn.functional as F
from numerics import BEHAVIOURS, assert_near_truth, compare, strided, wide

from rewriter.kernels.layer_norm import add_layer_norm, layer_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def eager(x, w, b, offset=0.0, round_before_weight=False, out_dtype=None, scale=1.0):
    h = wide(x)
    d = h - h.mean(-1, keepdim=True)
    n = scale * d * torch.rsqrt(d.square().mean(-1, keepdim=True) + 1e-6)
    n = wide(n.to(x.dtype)) if round_before_weight else n
    n = n if w is None else n * (offset + wide(w))
    return (n if b is None else n + wide(b)).to(out_dtype or x.dtype)


def both(**options):
    return lambda x, w, b: layer_norm(x, w, b, 1e-6, **options), lambda x, w, b: eager(x, w, b, **options)


def both_added(**options):
    def old(x, r, w, b):
        return eager(x + r, w, b, **options), x + r

    return lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-6, **options), old


def both_outside(outside, eps=0.0, offset=0.0, round_before_weight=False):
    """(x - mean) / (std(x) + outside), of the unbiased std where eps is 0, as The Annotated Transformer has it."""
    options = dict(offset=offset, round_before_weight=round_before_weight)

    def new(x, w, b):
        k = 1.0 if eps else (x.shape[-1] / (x.shape[-1] - 1)) ** 0.5
        return layer_norm(x, w, b, eps, scale=1 / k, outside=outside / k, **options)

    def old(x, w, b):
        h = wide(x)
        d = h - h.mean(-1, keepdim=True)
        std = (d.square().mean(-1, keepdim=True) + eps).sqrt() if eps else h.std(-1, keepdim=True)
        n = d / (std + outside)
        n = wide(n.to(x.dtype)) if round_before_weight else n
        n = n if w is None else n * (offset + wide(w))
        return (n if b is None else n + wide(b)).to(x.dtype)

    return new, old


def both_outside_added(outside, **options):
    _, old = both_outside(outside, **options)

    def new(x, r, w, b):
        k = (x.shape[-1] / (x.shape[-1] - 1)) ** 0.5
        return add_layer_norm(x, r, w, b, 0.0, scale=1 / k, outside=outside / k, **options)

    return new, lambda x, r, w, b: (old(x + r, w, b), x + r)


def without_dtype(options):
    return {name: value for name, value in options.items() if name != "out_dtype"}


def vectors(n, dtype=torch.float32, weight=True, bias=True):
    return [strided(n, dtype=dtype, seed=seed) if wanted else None for seed, wanted in ((2, weight), (3, bias))]


def flat_and_small_rows(*shape, **options):
    """A row of equal numbers, one of small differences, and others."""
    x = strided(*shape, grad=False, **options)
    x[..., 0, :] = 3
    x[..., 1, :] *= 1e-2
    return x.requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"round_before_weight": True}, {"out_dtype": torch.float32}])
@pytest.mark.parametrize("weight, bias", [(True, True), (True, False), (False, True), (False, False)])
def test_numbers(dtype, options, weight, bias):
    options = without_dtype(options) if dtype is torch.float64 else options
    inputs = [strided(3, 7, 65, dtype=dtype), *vectors(65, dtype, weight, bias)]
    compare(*both(**options), inputs, truth=both(**without_dtype(options))[1])


def test_float32_weight_on_bfloat16_input():
    options = dict(round_before_weight=True, out_dtype=torch.float32)
    inputs = [strided(4, 33, dtype=torch.bfloat16), *vectors(33)]
    compare(*both(**options), inputs, truth=both(round_before_weight=True)[1])


def test_large_mean():
    inputs = [(strided(5, 1000, grad=False) + 1000).requires_grad_(), *vectors(1000)]
    compare(both()[0], lambda x, w, b: F.layer_norm(x, (1000,), w, b, 1e-6), inputs)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2), (3, 1, 2, 0)])
@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_permuted_input_keeps_its_layout(order, kind):
    compare(*both(), [strided(2, 3, 5, 16, order=order), *vectors(16)], kind=kind)
    compare(*both_added(), [strided(2, 3, 5, 16, order=order), strided(2, 3, 5, 16, seed=4), *vectors(16)], kind=kind)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (1, 8), (8,), (3, 1), (3, 7)])
def test_small_shapes(shape):
    compare(*both(), [strided(*shape), *vectors(shape[-1])])
    compare(*both_added(), [strided(*shape), strided(*shape, seed=4), *vectors(shape[-1])])


@pytest.mark.parametrize("x, residual", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
@pytest.mark.parametrize("options", [{}, {"offset": 1.0, "round_before_weight": True}, {"out_dtype": torch.float32}])
def test_sum(x, residual, options):
    inputs = [strided(3, 7, 33, dtype=getattr(torch, x)), strided(3, 7, 33, dtype=getattr(torch, residual), seed=4)]
    compare(*both_added(**options), [*inputs, *vectors(33)], truth=both_added(**without_dtype(options))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"offset": 1.0, "round_before_weight": True}])
@pytest.mark.parametrize("width", [2, 33])
def test_outside(dtype, options, width):
    x = flat_and_small_rows(3, 7, width, dtype=dtype)
    compare(*both_outside(0.5, **options), [x, *vectors(width, dtype)])
    compare(*both_outside(0.5, **options), [x, None, None])


def test_outside_of_rows_from_nothing_to_one():
    """Row by row, as their gradients lie six orders apart; zeros get (g - mean(g)) / outside."""
    x = strided(6, 33, grad=False) * torch.tensor([0, 1e-10, 1e-6, 1e-4, 1e-2, 1]).unsqueeze(1)
    dy = strided(6, 33, seed=4, grad=False)
    new, old = both_outside(1e-6)
    results = []
    for f, dtype in ((new, torch.float32), (old, torch.float32), (old, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        y = f(leaf, None, None)
        results.append([y.detach(), *torch.autograd.grad(y, leaf, dy.to(dtype))])
    for name, *tensors in zip(("output", "gradient"), *results, strict=True):
        for i, row in enumerate(zip(*tensors, strict=True)):
            assert_near_truth(*row, f"{name} of row {i}", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("round_before_weight", [False, True])
def test_scale(dtype, round_before_weight):
    options = dict(scale=0.3, round_before_weight=round_before_weight)
    compare(*both(**options), [strided(3, 7, 65, dtype=dtype), *vectors(65, dtype)])


@pytest.mark.parametrize("x, residual", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
@pytest.mark.parametrize("options", [{}, {"offset": 1.0, "round_before_weight": True}])
def test_sum_with_outside(x, residual, options):
    x = flat_and_small_rows(3, 7, 33, dtype=getattr(torch, x))
    r = strided(3, 7, 33, dtype=getattr(torch, residual), grad=False, seed=4)
    r[..., :2, :] = 0
    compare(*both_outside_added(0.5, **options), [x, r.requires_grad_(), *vectors(33)])


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_only(output):
    inputs = [strided(3, 33), strided(3, 33, seed=4), *vectors(33)]
    wanted = inputs if output == 0 else inputs[:2]
    grads = [torch.autograd.grad(f(*inputs)[output].square().sum(), wanted) for f in both_added()]
    for new, old in zip(*grads, strict=True):
        torch.testing.assert_close(new, old)


def test_autocast_leaves_the_computation_in_float32():
    inputs = [strided(5, 64), *vectors(64)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(*both(), inputs)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour(behaviour):
    def build(n):
        return [strided(2, n, 3, 16, order=(0, 2, 1, 3)), strided(2, n, 3, 16, seed=4), *vectors(16)]

    behaviour(lambda x, w, b: layer_norm(x, w, b, 1e-6), lambda n: [t for i, t in enumerate(build(n)) if i != 1])
    behaviour(lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-6), build)
    behaviour(lambda x, r, w, b: add_layer_norm(x, r, w, b, 0.0, scale=0.9, outside=1e-6), build)


def test_operators_are_well_defined():
    ops = torch.ops.rewriter
    x, r = strided(3, 5, 8, order=(1, 0, 2), grad=False), strided(3, 5, 8, grad=False, seed=4)
    w, b = (t.detach() for t in vectors(8))
    options = (1e-6, 0.0, 0.5, 0.1, False, torch.float32)
    torch.library.opcheck(ops.layer_norm_forward, (x, w, b, *options))
    torch.library.opcheck(ops.add_layer_norm_forward, (x, r, w, b, *options))
    y, s, mean, rstd = ops.add_layer_norm_forward(x, r, w, b, *options)
    for ds, need in ((None, False), (y, True)):
        options = (0.0, 0.5, 0.1, False, True, need, need)
        torch.library.opcheck(ops.layer_norm_backward, (y, ds, s, w, b, mean, rstd, *options))


def test_wrong_shapes_are_named():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="weight must have shape"):
        layer_norm(x, torch.zeros(5), None, 1e-6)
    with pytest.raises(ValueError, match="bias must have shape"):
        layer_norm(x, None, torch.zeros(5), 1e-6)
    with pytest.raises(ValueError, match="must have the same shape"):
        add_layer_norm(x, torch.zeros(1, 4), None, None, 1e-6)


def test_negative_outside_is_named():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="outside must be at least 0"):
        layer_norm(x, None, None, 1e-6, outside=-1.0)
    with pytest.raises(ValueError, match="outside must be at least 0"):
        add_layer_norm(x, x, None, None, 1e-6, outside=-1.0)
