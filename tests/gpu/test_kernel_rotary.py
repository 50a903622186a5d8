"""The rotary Triton kernel on a GPU."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, compiles_inductor, eager_rotary, strided

from rewriter.kernels.rotary import rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HEADS_INSIDE = (0, 2, 1, 3)  # [B, H, T, D] as a view of [B, T, H, D]


def both(interleaved=False):
    return (
        lambda *t: rotary(*t, interleaved=interleaved),
        lambda *t: eager_rotary(*t, interleaved=interleaved),
    )


def tensor(*shape, **options):
    return strided(*shape, device="cuda", **options)


def tables(*shape, dtype=torch.float32, grad=False):
    return [tensor(*shape, dtype=dtype, grad=grad, seed=seed) for seed in (3, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", [(12, 2), (4, None)])
@pytest.mark.parametrize("width", [2, 30, 64, 80, 128, 256])
def test_numbers(dtype, interleaved, heads, width):
    q, k = (h and tensor(2, h, 517, width, order=HEADS_INSIDE, dtype=dtype, seed=h) for h in heads)
    compare(*both(interleaved), [q, k, *tables(1, 1, 517, width, dtype=dtype)])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), HEADS_INSIDE, (2, 0, 1, 3), (0, 1, 3, 2)])
@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_layouts(order, kind):
    q, k = (tensor(2, 3, 333, 64, order=order, seed=s) for s in (1, 2))
    compare(*both(), [q, k, *tables(2, 1, 333, 64)], kind=kind)


def test_slices_of_a_packed_projection():
    packed = tensor(2, 333, 24 * 64, dtype=torch.bfloat16, grad=False)
    heads = packed.view(2, 333, 24, 64).transpose(1, 2)
    inputs = [heads[:, :16].requires_grad_(), heads[:, 16:20].requires_grad_(), *tables(333, 64, dtype=torch.bfloat16)]
    compare(*both(), inputs)


def test_gradients_of_the_tables():
    compare(*both(), [tensor(2, 4, 65, 64), tensor(2, 2, 65, 64, seed=2), *tables(1, 1, 65, 64, grad=True)])


def test_float32_tables_promote():
    q, k = (tensor(2, h, 333, 128, dtype=torch.bfloat16, order=HEADS_INSIDE) for h in (12, 2))
    compare(*both(), [q, k, *tables(1, 1, 333, 128)], dtype=torch.bfloat16)


@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour(behaviour):
    def build(n):
        return [tensor(2, h, n, 8, order=HEADS_INSIDE) for h in (4, 2)] + tables(1, 1, n, 8)

    behaviour(lambda *t: rotary(*t), build)
