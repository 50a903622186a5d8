"""Scaled dot-product attention as models write it: `softmax(steps(q k^T)) v`, with the steps as data.

A call of PyTorch's scaled_dot_product_attention where that can say it. Soft caps, sinks and dropout are those of
attention.py. Not a kernel itself: it puts the steps together, and what it calls is differentiable.
"""

import torch
from torch.nn import functional as F

from . import attention as family


def attention(
    q, k, v, *tensors, steps=(), scale=1.0, is_causal=False, enable_gqa=False, transposed=False, heads=None,
    softcap=None, sink=False, dropout=0.0, drop_dtype=None, contiguous=True, out_dtype=None,
):  # fmt: skip
    """Attention of q [..., Tq, D], k [..., Tk, D], v [..., Tk, Dv] with up to two leading dimensions: batch and heads.

    steps: what is done to the scores, in order, as (kind, number, dimensions of the scores there): "scale" by the number,
    "multiply" or "divide" by a tensor, "cap", "add" or "subtract" a tensor, "keep" scores where a condition holds or "drop"
    them where it does: they become the number. tensors: a sink [H] if `sink`, then one for each step that needs it;
    without steps, maybe PyTorch's attn_mask. scale: of the scores before all steps. transposed: k is [..., D, Tk].
    heads: the leading dimension of q and k, and maybe of v, is batch * heads. softcap: the number of the step "cap".
    dropout: probabilities are dropped as `F.dropout` drops a tensor of drop_dtype, with the same random numbers.
    contiguous: the layout of a matrix product, else that of scaled_dot_product_attention.
    Returns [..., Tq, Dv] in out_dtype, with the leading dimensions of v (of q where k and v have fewer heads).
    """
    k = k.transpose(-2, -1) if transposed else k
    sinks, *tensors = tensors if sink else (None, *tensors)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    lead = q.shape[:-2] if v.dim() == q.dim() else (-1, heads)
    shape, kept = (*lead, q.shape[-2], v.shape[-1]), None
    if steps:
        q, scale, mask = _merged(q, steps, tensors, heads)
        if mask is not None and mask.dtype is not torch.bool:
            mask = mask.clamp(min=torch.finfo(dtype).min).to(dtype)
    else:
        mask = _lifted(tensors[0], q.dim(), heads) if tensors else None
    if dropout:
        size = (*q.shape[:-2], q.shape[-2], k.shape[-2]) if v.dim() == q.dim() else (*v.shape[:2], q.shape[-2], k.shape[-2])
        kept = _four(F.dropout(torch.ones(size, dtype=drop_dtype, device=q.device), dropout, True) != 0, heads)
    q, k, v = (_four(t, heads) for t in (q, k, v))
    if softcap or sink or dropout:
        options = {"scale": scale, "softcap": softcap, "is_causal": is_causal, "out_dtype": dtype}
        out = family.attention(q, k, v, bias=mask, sink=sinks, keep=kept, dropout=dropout, **options)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    return (out.contiguous().view(shape) if contiguous else out.reshape(shape)).to(out_dtype)


def _merged(q, steps, tensors, heads):
    """All steps as three: queries that were multiplied, a scale, and one condition or bias (or None) behind both."""
    scale, mask, tensors = 1.0, None, iter(tensors)
    fills = [number for kind, number, _ in steps if kind in ("keep", "drop")]
    only = sum(kind in ("add", "subtract", "keep", "drop") for kind, _, _ in steps) == 1
    for kind, number, ndim in steps:
        if kind == "cap":
            continue  # the kernel's part
        if kind == "scale":
            scale, mask = scale * number, None if mask is None else mask * number
        elif kind in ("multiply", "divide"):
            factor = next(tensors)
            factor = 1 / factor if kind == "divide" else factor
            q, mask = q * factor.to(q.dtype), None if mask is None else mask * _lifted(factor, ndim, heads)
        elif kind in ("add", "subtract"):
            bias = _lifted(next(tensors), ndim, heads)
            bias = -bias if kind == "subtract" else bias
            mask = bias if mask is None else mask + bias
        else:
            condition = _lifted(next(tensors), ndim, heads)
            condition = condition if kind == "keep" else ~condition
            if only and fills == [float("-inf")]:
                mask = condition
            else:
                mask = torch.where(condition, torch.zeros((), dtype=q.dtype, device=q.device) if mask is None else mask, number)
    return q, scale, mask


def _lifted(tensor, ndim, heads):
    """What broadcasts with scores of `ndim` dimensions, so that it broadcasts with [B, H, Tq, Tk]."""
    if ndim != 3 or tensor.dim() != 3:
        return tensor
    return tensor.unflatten(0, (-1, heads)) if heads is not None and tensor.shape[0] != 1 else tensor.unsqueeze(1)


def _four(tensor, heads):
    """[B, H, T, D] of a tensor with fewer leading dimensions, or with both in one."""
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() == 2:
        return tensor[None, None]
    return tensor.unsqueeze(-3) if heads is None else tensor.unflatten(0, (-1, heads))
