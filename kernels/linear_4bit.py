"""A frozen linear layer whose weight is kept in 4 bits (Dettmers et al., "QLoRA", 2023).

    y = x W^T + bias,  dx = dY W,  dbias = sum of dY over the rows

W is unpacked for forward and once more for backward: in between there are only its 4 bits.
"""

import torch
from torch.autograd.function import once_differentiable

from .common import no_autocast, traceable
from .dequantize_4bit import dequantize_4bit, saved, to_save


@traceable
def linear_4bit(x, weight, bias=None, *, out_dtype=None):
    """y [..., N] of x [..., K] and weight, a Packed4bit [N, K]; both products are of weight.dtype.

    bias: [N] or None. out_dtype: default weight.dtype. Gradients: x in x.dtype, bias in bias.dtype.
    Raises ValueError for a weight or bias that doesn't fit.
    """
    if x.shape[-1] != weight.shape[1] or (bias is not None and tuple(bias.shape) != (weight.shape[0],)):
        shapes = [list(x.shape), list(weight.shape), bias if bias is None else list(bias.shape)]
        raise ValueError("x, weight and bias have shapes {}, {} and {}".format(*shapes))
    return _Linear4bit.apply(x, bias, weight, out_dtype or weight.dtype)


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, weight, out_dtype):
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        tensors, ctx.packed = to_save([weight])
        ctx.save_for_backward(*tensors)
        with no_autocast(x):
            bias = bias if bias is None else bias.to(weight.dtype)
            y = torch.nn.functional.linear(x.to(weight.dtype), dequantize_4bit(weight), bias)
            return y.to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (weight,) = saved(ctx.saved_tensors, ctx.packed)
        need_dx, need_bias, *_ = ctx.needs_input_grad
        dx = dbias = None
        with no_autocast(dy):
            dy = dy.to(weight.dtype)
            if need_dx:
                dx = torch.matmul(dy, dequantize_4bit(weight, after=dy)).to(ctx.x_dtype)
            if need_bias:
                dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dx, dbias, None, None
