"""The rotary Triton kernel, interpreted, on small odd shapes."""

import pytest
import torch
from numerics import compare, eager_rotary, fakes, strided

from rewriter.kernels.rotary import rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HEADS_INSIDE = (0, 2, 1, 3)  # [B, H, T, D] as a view of [B, T, H, D]


def both(interleaved=False):
    return (
        lambda *t: rotary(*t, interleaved=interleaved),
        lambda *t: eager_rotary(*t, interleaved=interleaved),
    )


def tables(*shape, dtype=torch.float32, grad=False):
    return [strided(*shape, dtype=dtype, grad=grad, seed=seed) for seed in (3, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (5, 2), (4, None)])
def test_numbers(dtype, interleaved, heads):
    q, k = (h and strided(2, h, 7, 10, order=HEADS_INSIDE, dtype=dtype, seed=h) for h in heads)
    compare(*both(interleaved), [q, k, *tables(1, 1, 7, 10, dtype=dtype)])


@pytest.mark.parametrize("width", [2, 6, 64, 130])
def test_widths(width):
    q, k = (strided(1, h, 5, width, order=HEADS_INSIDE, seed=h) for h in (3, 2))
    compare(*both(), [q, k, *tables(5, width)])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), HEADS_INSIDE, (2, 0, 1, 3), (0, 1, 3, 2)])
@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_layouts(order, kind):
    q, k = (strided(2, 3, 5, 8, order=order, seed=s) for s in (1, 2))
    compare(*both(), [q, k, *tables(2, 1, 5, 8)], kind=kind)


def test_slices_of_a_packed_projection():
    packed = strided(2, 5, 6 * 8, grad=False)
    heads = packed.view(2, 5, 6, 8).transpose(1, 2)
    compare(*both(), [heads[:, :4].requires_grad_(), heads[:, 4:].requires_grad_(), *tables(5, 8)])


def test_expanded_keys():
    k = strided(2, 1, 5, 8, grad=False).expand(2, 3, 5, 8).requires_grad_()
    compare(*both(), [strided(2, 3, 5, 8, seed=2), k, *tables(5, 8)], layout=False)


@pytest.mark.parametrize("shape", [(7, 8), (3, 7, 8), (2, 3, 2, 2, 7, 8)])
def test_ranks(shape):
    compare(*both(), [strided(*shape), strided(*shape, seed=5), *tables(7, 8)])
    compare(*both(), [strided(*shape), strided(*shape, seed=5), *tables(*shape)])


def test_tables_with_unlike_layouts():
    q = strided(2, 3, 5, 8)
    cos, sin = strided(5, 8, grad=False), strided(2, 1, 5, 8, grad=False)
    compare(*both(), [q, None, cos, sin])
    compare(*both(), [q, None, strided(5, 8, order=(1, 0), grad=False), sin])


def test_gradients_of_the_tables():
    q, k = strided(2, 4, 5, 8), strided(2, 2, 5, 8, seed=2)
    for interleaved in (False, True):
        compare(*both(interleaved), [q, k, *tables(1, 1, 5, 8, grad=True)])


def test_no_tokens():
    compare(*both(), [strided(2, 4, 0, 8), strided(2, 2, 0, 8), *tables(1, 1, 0, 8)])


def test_layouts_are_those_of_the_fake_operator():
    def build(n):
        return [strided(2, h, n, 8, order=HEADS_INSIDE) for h in (4, 2)] + tables(1, 1, n, 8)

    fakes(lambda *t: rotary(*t), build)
