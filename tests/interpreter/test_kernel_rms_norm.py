"""RMSNorm's Triton kernels, interpreted, on small odd shapes."""

import pytest
import torch
from numerics import compare, eager_rms_norm, fakes, strided

from rewriter.kernels.common import use_triton
from rewriter.kernels.rms_norm import rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def both(**options):
    return lambda x, w: rms_norm(x, w, 1e-6, **options), lambda x, w: eager_rms_norm(x, w, 1e-6, **options)


def test_triton_is_what_runs():
    assert use_triton(torch.zeros(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"round_before_weight": True}])
@pytest.mark.parametrize("weighted", [True, False])
def test_numbers(dtype, options, weighted):
    compare(*both(**options), [strided(3, 7, 65, dtype=dtype), strided(65, dtype=dtype, seed=2) if weighted else None])


@pytest.mark.parametrize("shape", [(1, 1), (37, 1), (131, 3), (70, 64), (5, 128), (1, 2049), (2, 8193), (2, 16389)])
def test_widths(shape):
    """Several rows a tile; one row a tile; wider than backward's tile; wider than forward's."""
    compare(*both(round_before_weight=True), [strided(*shape), strided(shape[-1], seed=2)])
    compare(*both(), [strided(*shape, dtype=torch.bfloat16, grad=False), strided(shape[-1], seed=2)], truth=both()[1])


def test_only_the_input_needs_a_gradient():
    for width in (33, 8193):
        compare(*both(offset=1.0), [strided(3, width), strided(width, seed=2, grad=False)])


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2), (3, 1, 2, 0)])
@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_permuted_input(order, kind):
    compare(*both(), [strided(2, 3, 5, 16, order=order), strided(16, seed=2)], kind=kind)


def test_slices_and_expansions():
    packed = strided(2, 5, 3 * 4 * 8, grad=False)
    w = strided(16, seed=2, grad=False)[::2].requires_grad_()
    compare(*both(), [packed[..., 32:64].view(2, 5, 4, 8).transpose(1, 2).requires_grad_(), w])
    compare(*both(), [packed[:, ::2, 3:11].requires_grad_(), w])
    expanded = strided(2, 1, 8, grad=False).expand(2, 3, 8).requires_grad_()
    compare(*both(), [expanded, w], layout=False)


def test_float32_weight_on_bfloat16_input():
    options = dict(round_before_weight=True, out_dtype=torch.float32)
    inputs = [strided(4, 33, dtype=torch.bfloat16), strided(33, seed=2)]
    compare(*both(**options), inputs, truth=both(round_before_weight=True)[1])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,)])
def test_small_shapes(shape):
    compare(*both(), [strided(*shape), strided(8, seed=2)])


def test_layouts_are_those_of_the_fake_operator():
    fakes(lambda x, w: rms_norm(x, w, 1e-6), lambda n: [strided(2, n, 3, 16, order=(0, 2, 1, 3)), strided(16)])
