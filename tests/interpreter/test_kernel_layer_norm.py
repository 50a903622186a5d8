"""LayerNorm's Triton kernels, interpreted, on small odd shapes."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_near_truth, compare, fakes, strided, wide

from rewriter.kernels.common import use_triton
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


def vectors(n, dtype=torch.float32, weight=True, bias=True):
    return [strided(n, dtype=dtype, seed=seed) if wanted else None for seed, wanted in ((2, weight), (3, bias))]


def flat_and_small_rows(*shape, **options):
    """A row of equal numbers, one of small differences, and others."""
    x = strided(*shape, grad=False, **options)
    x[..., 0, :] = 3
    x[..., 1, :] *= 1e-2
    return x.requires_grad_()


def test_triton_is_what_runs():
    assert use_triton(torch.zeros(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"scale": 0.3, "round_before_weight": True}])
@pytest.mark.parametrize("weight, bias", [(True, True), (True, False), (False, True), (False, False)])
def test_numbers(dtype, options, weight, bias):
    compare(*both(**options), [strided(3, 7, 65, dtype=dtype), *vectors(65, dtype, weight, bias)])


@pytest.mark.parametrize("shape", [(1, 1), (131, 7), (70, 33), (5, 1000), (1, 2049), (2, 8193), (2, 16389)])
def test_widths(shape):
    """Several rows a tile; one row a tile; wider than backward's tile; wider than forward's."""
    compare(*both(round_before_weight=True), [strided(*shape), *vectors(shape[-1])])
    compare(*both_added(), [strided(*shape), strided(*shape, seed=4, grad=False), *vectors(shape[-1])])


def test_some_gradients_only():
    for width in (33, 8193):
        x, (w, b) = strided(3, width), vectors(width)
        for inputs in ([x, w.detach(), b.detach()], [x, w.detach(), b], [x.detach(), w, b.detach()]):
            compare(*both(offset=1.0), inputs)


@pytest.mark.parametrize("width", [1000, 16389])
def test_large_mean(width):
    """The second width puts rows of different means into one: the moments of the tiles must combine."""
    x = strided(3, width, grad=False) + 1000
    x[1, : width // 3] -= 2000
    compare(both()[0], lambda x, w, b: F.layer_norm(x, (width,), w, b, 1e-6), [x.requires_grad_(), *vectors(width)])


def test_constant_rows_have_no_variance():
    for value in (0.0, 1e6 + 0.0625):
        x = torch.full((3, 777), value, requires_grad=True)
        y = layer_norm(x, None, None, 1e-12)
        y.sum().backward()
        assert torch.equal(y, torch.zeros_like(y)) and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2), (3, 1, 2, 0)])
@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_permuted_input(order, kind):
    compare(*both(), [strided(2, 3, 5, 16, order=order), *vectors(16)], kind=kind)
    compare(*both_added(), [strided(2, 3, 5, 16, order=order), strided(2, 3, 5, 16, seed=4), *vectors(16)], kind=kind)


def test_slices_and_expansions():
    packed = strided(2, 5, 3 * 4 * 8, grad=False)
    w, b = (strided(16, seed=seed, grad=False)[::2].requires_grad_() for seed in (2, 3))
    q, part = packed[..., 32:64].view(2, 5, 4, 8).transpose(1, 2), packed[:, ::2, 3:11]
    expanded = strided(2, 1, 8, grad=False).expand(2, 3, 8)
    for x in (q, part, expanded):
        r = strided(*x.shape, seed=4)
        compare(*both(), [x.requires_grad_(), w, b], layout=x is not expanded)
        compare(*both_added(), [x, r, w, b])
        compare(*both_added(), [r, x, w, b])


@pytest.mark.parametrize("x, residual", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
@pytest.mark.parametrize("options", [{}, {"offset": 1.0, "round_before_weight": True}])
def test_sum(x, residual, options):
    inputs = [strided(3, 7, 33, dtype=getattr(torch, x)), strided(3, 7, 33, dtype=getattr(torch, residual), seed=4)]
    compare(*both_added(**options), [*inputs, *vectors(33)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"offset": 1.0, "round_before_weight": True}])
def test_outside(dtype, options):
    for width in (2, 33, 8193, 16389) if dtype is torch.float32 else (33,):
        compare(*both_outside(0.5, **options), [flat_and_small_rows(3, width, dtype=dtype), *vectors(width, dtype)])


@pytest.mark.parametrize("round_before_weight", [False, True])
def test_scale(round_before_weight):
    for width in (33, 8193, 16389):
        options = dict(scale=0.3, round_before_weight=round_before_weight)
        compare(*both(**options), [strided(3, width), *vectors(width)])


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


@pytest.mark.parametrize("width", [33, 8193])
def test_sum_with_outside(width):
    x, r = flat_and_small_rows(3, width), strided(3, width, grad=False, seed=4)
    r[:2] = 0
    compare(*both_outside_added(0.5, offset=1.0), [x, r.requires_grad_(), *vectors(width)])
    compare(*both_outside_added(0.5), [x, r, None, None])


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_only(output):
    inputs = [strided(3, 33), strided(3, 33, seed=4), *vectors(33)]
    wanted = inputs if output == 0 else inputs[:2]
    grads = [torch.autograd.grad(f(*inputs)[output].square().sum(), wanted) for f in both_added()]
    for new, old in zip(*grads, strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,)])
def test_small_shapes(shape):
    compare(*both(), [strided(*shape), *vectors(8)])
    compare(*both_added(), [strided(*shape), strided(*shape, seed=4), *vectors(8)])


def test_layouts_are_those_of_the_fake_operator():
    def build(n):
        return [strided(2, n, 3, 16, order=(0, 2, 1, 3)), strided(2, n, 3, 16, seed=4), *vectors(16)]

    fakes(lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-6), build)
