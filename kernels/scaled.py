"""Gradients that were made for an upstream gradient of 1, times the one that came: y = factor x, one factor for all."""

import torch

from .common import DECOMPOSITIONS, ceil_div, jit, on_device, processors, register, tl, use_triton


@jit
def _scale_kernel(X, FACTOR, Y, count, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Y = X * FACTOR; Y may be X, IN_PLACE, which is left alone if the factor is 1. Programs stride over blocks."""
    factor = tl.load(FACTOR)
    blocks = tl.cdiv(count, BLOCK).to(tl.int32)
    if IN_PLACE:
        blocks = tl.where(factor == 1, 0, blocks)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        at = (tl.zeros([BLOCK], tl.int64) + block) * BLOCK + tl.arange(0, BLOCK)
        if block < count // BLOCK:  # without a mask loads and stores are wide
            tl.store(Y + at, tl.load(X + at).to(factor.dtype) * factor)
        else:
            tl.store(Y + at, tl.load(X + at, mask=at < count).to(factor.dtype) * factor, mask=at < count)


def _scale(x, factor, dtype):
    """x * factor (a 0-d tensor) computed in factor's dtype; the kernel makes no copy of x in that dtype."""
    if not use_triton(x):
        return (x.to(factor.dtype) * factor).to(dtype)
    return _scale_into(_scale_fake(x, factor, dtype), x.contiguous(), factor)


def scale_in_place(x, factor):
    """x *= factor (a 0-d tensor), without the cost of it if the factor is 1. x: contiguous."""
    if use_triton(x):
        _scale_into(x, x, factor)
    else:
        x.mul_(factor)


def _scale_into(y, x, factor):
    BLOCK = 4096
    if x.numel():
        with on_device(x):
            programs = min(ceil_div(x.numel(), BLOCK), 8 * processors(x))
            _scale_kernel[(programs,)](x, factor, y, x.numel(), IN_PLACE=y is x, BLOCK=BLOCK, num_warps=8)
    return y


def _scale_fake(x, factor, dtype):
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


scale_op = register("scaled(Tensor x, Tensor factor, ScalarType dtype) -> Tensor", _scale, _scale_fake)
# Inductor writes it over x, which nothing else will read: no copy of a weight's gradient.
DECOMPOSITIONS[scale_op] = lambda x, factor, dtype: (x.to(factor.dtype) * factor).to(dtype)
