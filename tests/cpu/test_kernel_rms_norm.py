"""RMSNorm's reference operator against eager PyTorch and float64."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, eager_rms_norm, strided

from rewriter.kernels.rms_norm import rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def both(**options):
    return lambda x, w: rms_norm(x, w, 1e-6, **options), lambda x, w: eager_rms_norm(x, w, 1e-6, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"round_before_weight": True}, {"out_dtype": torch.float32}])
@pytest.mark.parametrize("weighted", [True, False])
def test_numbers(dtype, options, weighted):
    weight = strided(65, dtype=dtype, seed=2) if weighted else None
    if dtype is torch.float64 and "out_dtype" in options:
        options = {}
    truth = both(**{k: v for k, v in options.items() if k != "out_dtype"})[1]
    compare(*both(**options), [strided(3, 7, 65, dtype=dtype), weight], truth=truth)


def test_float32_weight_on_bfloat16_input():
    options = dict(round_before_weight=True, out_dtype=torch.float32)
    inputs = [strided(4, 33, dtype=torch.bfloat16), strided(33, seed=2)]
    compare(*both(**options), inputs, truth=both(round_before_weight=True)[1])


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2), (3, 1, 2, 0)])
@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_permuted_input_keeps_its_layout(order, kind):
    compare(*both(), [strided(2, 3, 5, 16, order=order), strided(16, seed=2)], kind=kind)


def test_slice_of_a_packed_projection():
    packed = strided(2, 5, 3 * 4 * 8, grad=False)
    q = packed[..., 32:64].view(2, 5, 4, 8).transpose(1, 2).requires_grad_()
    compare(*both(), [q, strided(16, seed=2, grad=False)[::2].requires_grad_()])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (1, 8), (8,)])
def test_small_shapes(shape):
    compare(*both(), [strided(*shape), strided(8, seed=2)])


def test_autocast_leaves_the_computation_in_float32():
    x, w = strided(5, 64), strided(64, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(*both(), [x, w])


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour(behaviour):
    behaviour(lambda x, w: rms_norm(x, w, 1e-6), lambda n: [strided(2, n, 3, 16, order=(0, 2, 1, 3)), strided(16)])


def test_operators_are_well_defined():
    x, w = strided(3, 5, 8, order=(1, 0, 2), grad=False), strided(8, grad=False)
    torch.library.opcheck(torch.ops.rewriter.rms_norm_forward, (x, w, 1e-6, 0.0, False, torch.float32))
    y, rstd = torch.ops.rewriter.rms_norm_forward(x, w, 1e-6, 0.0, False, torch.float32)
    torch.library.opcheck(torch.ops.rewriter.rms_norm_backward, (y, x, w, rstd, 0.0, False, True, False))


def test_wrong_weight_is_named():
    with pytest.raises(ValueError, match="weight must have shape"):
        rms_norm(torch.zeros(2, 4), torch.zeros(5), 1e-6)
