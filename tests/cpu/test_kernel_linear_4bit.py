"""A linear layer of a weight in 4 bits against eager PyTorch with the unpacked weight, and float64."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, fakes, strided
from packed import random_packed, unpacked

from rewriter.kernels.linear_4bit import linear_4bit

KINDS = [("nf4", True), ("fp4", False)]


def both(weight, **options):
    """(operator, eager): functions of x and bias."""

    def eager(x, bias=None):
        matrix = unpacked(weight, x.dtype if x.dtype is torch.float64 else weight.dtype)
        y = torch.nn.functional.linear(x.to(matrix.dtype), matrix, bias if bias is None else bias.to(matrix.dtype))
        return y if x.dtype is torch.float64 else y.to(options.get("out_dtype", y.dtype))

    return lambda x, bias=None: linear_4bit(x, weight, bias, **options), eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers(kind, bias, dtype):
    weight = random_packed((48, 64), *kind, dtype=dtype)
    inputs = [strided(3, 7, 64, dtype=dtype), *([strided(48, dtype=dtype, seed=1)] if bias else [])]
    for kind_of_gradient in ("dense", "expanded", "strided"):
        compare(*both(weight), inputs, kind=kind_of_gradient)


def test_other_dtypes_around_it():
    weight = random_packed((48, 64), dtype=torch.bfloat16)
    inputs = [strided(3, 7, 64), strided(48, seed=1)]
    compare(*both(weight, out_dtype=torch.float32), inputs, dtype=torch.bfloat16)


@pytest.mark.parametrize("rows", [(0, 4), (1,), ()])
def test_rows(rows):
    weight = random_packed((48, 64))
    x = torch.randn(*rows, 64, requires_grad=True)
    y = linear_4bit(x, weight)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (y.shape, dx.shape) == ((*rows, 48), x.shape)
    torch.testing.assert_close(y, x @ unpacked(weight).t())


def test_the_unpacked_weight_is_not_kept():
    weight = random_packed((48, 64), nested=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_4bit(torch.randn(5, 64, requires_grad=True), weight)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in weight.tensors()}


def kept_by_a_compiler(function, x):
    """Elements of the largest tensor that a compiled forward keeps for backward."""
    kept = []
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compiled(x)
    return max(t.numel() for t in kept)


def test_nor_is_it_by_a_compiler():
    """Which would unpack it in forward for both, unless backward waits for its gradient."""
    weight = random_packed((256, 64))
    x = torch.randn(5, 64, requires_grad=True)
    assert kept_by_a_compiler(lambda x: linear_4bit(x, weight), x) <= 256 * 64 // 2


@pytest.mark.parametrize("behaviour", [b for b in BEHAVIOURS if b is not fakes])  # the weight is a real one here
def test_behaviour(behaviour):
    weight = random_packed((48, 64), nested=True)
    new, _ = both(weight)
    behaviour(new, lambda n: [strided(2, n, 64), strided(48, seed=1)])


def test_wrong_arguments_are_named():
    weight = random_packed((48, 64))
    with pytest.raises(ValueError, match=r"shapes \[2, 63\], \[48, 64\] and None"):
        linear_4bit(torch.randn(2, 63), weight)
    with pytest.raises(ValueError, match=r"and \[47\]"):
        linear_4bit(torch.randn(2, 64), weight, torch.randn(47))
