"""LayerNorm's Triton kernels on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from numerics import BEHAVIOURS, compare, compiles_inductor, strided, upstream_like, wide

from rewriter.kernels.layer_norm import add_layer_norm, layer_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def eager(x, w, b, offset=0.0, round_before_weight=False):
    h = wide(x)
    d = h - h.mean(-1, keepdim=True)
    n = d * torch.rsqrt(d.square().mean(-1, keepdim=True) + 1e-6)
    n = wide(n.to(x.dtype)) if round_before_weight else n
    n = n if w is None else n * (offset + wide(w))
    return (n if b is None else n + wide(b)).to(x.dtype)


def both(**options):
    return lambda x, w, b: layer_norm(x, w, b, 1e-6, **options), lambda x, w, b: eager(x, w, b, **options)


def both_added(**options):
    def old(x, r, w, b):
        return eager(x + r, w, b, **options), x + r

    return lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-6, **options), old


def tensor(*shape, **options):
    return strided(*shape, device="cuda", **options)


def vectors(n, dtype=torch.float32):
    return [tensor(n, dtype=dtype, seed=seed) for seed in (2, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"round_before_weight": True}])
@pytest.mark.parametrize("width", [2, 63, 128, 768, 4096, 5001, 8192, 16385, 32768])
def test_numbers(dtype, options, width):
    x, (w, b) = tensor(3, 257, width, dtype=dtype), vectors(width, dtype)
    compare(*both(**options), [x, w, b])
    compare(*both(**options), [x, None, b])
    compare(*both(), [x, None, None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_element(dtype):
    """Nothing is left of x, and of its gradient the rounding of dy * weight, which rstd = 1000 multiplies."""
    x, (w, b) = tensor(257, 1, dtype=dtype), vectors(1, dtype)
    y = layer_norm(x, w, b, 1e-6)
    assert torch.equal(y, b.expand_as(y))
    dy = upstream_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    assert dx.abs().max() <= 1e-7 * 1e3 * (dy * w).abs().max()
    assert torch.equal(dw, torch.zeros_like(dw))
    torch.testing.assert_close(db, dy.double().sum(0).to(dtype))


@pytest.mark.parametrize("x, residual", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
@pytest.mark.parametrize("options", [{}, {"offset": 1.0, "round_before_weight": True}])
@pytest.mark.parametrize("width", [1, 63, 768, 8192, 16385])
def test_sum(x, residual, options, width):
    inputs = [tensor(257, width, dtype=getattr(torch, x)), tensor(257, width, dtype=getattr(torch, residual), seed=4)]
    compare(*both_added(**options), [*inputs, *vectors(width)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 64, 1000, 5001, 32768])
def test_scale_and_outside(dtype, width):
    """(x - mean) / (std(x) + outside) with a row of equal numbers and one of small differences, alone and of a sum."""
    x, (w, b) = tensor(257, width, dtype=dtype, grad=False), vectors(width, dtype)
    x[0], x[1] = 3, x[1] * 1e-2
    k = (width / (width - 1)) ** 0.5

    def old(x, w, b):
        h = wide(x)
        return ((h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 0.5) * wide(w) + wide(b)).to(x.dtype)

    options = dict(scale=1 / k, outside=0.5 / k)
    compare(lambda x, w, b: layer_norm(x, w, b, 0.0, **options), old, [x.requires_grad_(), w, b])
    compare(
        lambda x, r, w, b: add_layer_norm(x, r, w, b, 0.0, **options),
        lambda x, r, w, b: (old(x + r, w, b), x + r),
        [x, torch.zeros_like(x).requires_grad_(), w, b],
    )


@pytest.mark.parametrize("width", [33, 768, 5001, 32768])
def test_large_mean(width):
    """Half of the last row has another mean: where it is wider than a tile, the moments of its tiles must combine."""
    x = tensor(65, width, grad=False) + 1000
    x[-1, width // 2 :] -= 2000
    x, (w, b) = x.requires_grad_(), vectors(width)
    compare(both()[0], lambda x, w, b: F.layer_norm(x, (width,), w, b, 1e-6), [x, w, b])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_layouts(order, kind):
    x, (w, b) = tensor(2, 12, 333, 128, order=order, dtype=torch.bfloat16), vectors(128, torch.bfloat16)
    compare(*both(), [x, w, b], kind=kind)
    compare(*both_added(), [x, tensor(2, 12, 333, 128, dtype=torch.bfloat16, seed=4), w, b], kind=kind)


def test_gradients_of_weight_and_bias_are_bit_equal_on_repeat():
    x, (w, b) = tensor(8191, 1536, dtype=torch.bfloat16), vectors(1536, torch.bfloat16)
    y = layer_norm(x, w, b, 1e-6)
    dy = upstream_like(y)
    first, *others = (torch.autograd.grad(y, (w, b), dy, retain_graph=True) for _ in range(5))
    assert all(torch.equal(one, other) for pair in others for one, other in zip(first, pair, strict=True))


@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour(behaviour):
    def build(n):
        return [tensor(2, n, 3, 16, order=(0, 2, 1, 3)), tensor(2, n, 3, 16, seed=4), *vectors(16)]

    behaviour(lambda x, w, b: layer_norm(x, w, b, 1e-6), lambda n: [t for i, t in enumerate(build(n)) if i != 1])
    behaviour(lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-6), build)
    behaviour(lambda x, r, w, b: add_layer_norm(x, r, w, b, 0.0, scale=0.9, outside=1e-6), build)
