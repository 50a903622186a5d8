"""Rotary embedding's reference operator against eager PyTorch and float64."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, eager_rotary, strided

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
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, None)])
def test_numbers(dtype, interleaved, heads):
    q, k = (h and strided(2, h, 7, 10, order=HEADS_INSIDE, dtype=dtype, seed=h) for h in heads)
    compare(*both(interleaved), [q, k, *tables(1, 1, 7, 10, dtype=dtype)])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), HEADS_INSIDE, (2, 0, 1, 3), (0, 1, 3, 2)])
@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_layouts(order, kind):
    q, k = (strided(2, 3, 5, 8, order=order, seed=s) for s in (1, 2))
    compare(*both(), [q, k, *tables(2, 1, 5, 8)], kind=kind)


def test_slices_of_a_packed_projection():
    packed = strided(2, 5, 6 * 8, grad=False)
    heads = packed.view(2, 5, 6, 8).transpose(1, 2)
    compare(*both(), [heads[:, :4].requires_grad_(), heads[:, 4:].requires_grad_(), *tables(5, 8)])


@pytest.mark.parametrize("shape", [(7, 8), (3, 7, 8), (2, 3, 2, 2, 7, 8)])
def test_ranks(shape):
    compare(*both(), [strided(*shape), strided(*shape, seed=5), *tables(7, 8)])


def test_gradients_of_the_tables():
    q, k = strided(2, 4, 5, 8), strided(2, 2, 5, 8, seed=2)
    for interleaved in (False, True):
        compare(*both(interleaved), [q, k, *tables(1, 1, 5, 8, grad=True)])


def test_float32_tables_promote():
    q = strided(2, 4, 5, 8, dtype=torch.bfloat16)
    compare(*both(), [q, None, *tables(1, 1, 5, 8)], dtype=torch.bfloat16)


def test_no_tokens():
    compare(*both(), [strided(2, 4, 0, 8), strided(2, 2, 0, 8), *tables(1, 1, 0, 8)])


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(*both(), [strided(2, 4, 5, 8), strided(2, 2, 5, 8), *tables(1, 1, 5, 8)])


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("with_k", [True, False])
def test_behaviour(behaviour, with_k):
    def build(n):
        count = 2 if with_k else 1
        return [strided(2, h, n, 8, order=HEADS_INSIDE) for h in (4, 2)[:count]] + tables(1, 1, n, 8)

    behaviour((lambda *t: rotary(*t)) if with_k else (lambda q, cos, sin: rotary(q, None, cos, sin)[0]), build)


def test_operator_is_well_defined():
    q, k = (strided(2, h, 5, 8, order=HEADS_INSIDE, grad=False) for h in (4, 2))
    arguments = (q, k, *tables(1, 1, 5, 8), False, False, False, torch.float32, torch.float32)
    torch.library.opcheck(torch.ops.rewriter.rotary, (*arguments, None, None))
    torch.library.opcheck(torch.ops.rewriter.rotary, (*arguments, q.stride(), (80, 40, 8, 1)))


def test_odd_dimension_is_named():
    with pytest.raises(ValueError, match="even"):
        rotary(torch.zeros(2, 5), None, torch.zeros(2, 5), torch.zeros(2, 5))
