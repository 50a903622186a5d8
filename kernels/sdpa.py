"""Scaled dot-product attention as models write it: `softmax(steps(q k^T)) v`, with the steps as data.

A call of PyTorch's scaled_dot_product_attention where that can say it, else of our own kernel (attention.py). Not a
kernel itself: it puts the steps together, and what it calls is differentiable.
"""

import torch
from torch.nn import functional as F

from . import attention as family


def attention(
    q, k, v, *tensors, steps=(), scale=1.0, is_causal=False, enable_gqa=False, transposed=False, heads=None,
    softcap=None, sink=False, dropout=0.0, drop_dtype=None, contiguous=True, dtype=None, out_dtype=None,
):  # fmt: skip
    """Attention of q [..., Tq, D], k [..., Tk, D] and v [..., Tk, Dv] with up to three leading dimensions.

    steps: what is done to the scores, in order, as (kind, number, dimensions of the scores there): "scale" by the
    number, "multiply" or "divide" by a tensor, "cap", "add" or "subtract" a tensor, "keep" scores where a condition
    holds or "drop" them where it does: they become the number. tensors: a sink if `sink`, then one for each step that
    needs it; without steps, maybe PyTorch's attn_mask. scale: of the scores before all steps. transposed: k is
    [..., D, Tk]. heads: the leading dimension of q and k, and maybe of v, is batch * heads. k and v may have fewer
    heads than q. softcap: the number of the step "cap". sink: [H], or broadcasts to [B, H, Tq] or [B, H, Tq, 1].
    dropout: probabilities are dropped as `F.dropout` drops a tensor of drop_dtype, with the same random numbers.
    dtype: q, k and v are rounded to it first, default what they promote to. contiguous: the layout of a matrix
    product, else that of scaled_dot_product_attention. Returns [..., Tq, Dv] in out_dtype.

    A mask by a large finite number is our kernel's: PyTorch's fused ones keep the maximum and the logarithm of the sum
    as one number, in which the latter is lost, and give queries that see no key a wrong gradient.
    """
    k = k.transpose(-2, -1) if transposed else k
    sinks, *tensors = tensors if sink else (None, *tensors)
    dtype = dtype or torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    lead = q.shape[:-2] if heads is None or v.dim() == 3 else (-1, heads)
    shape, groups = (*lead, q.shape[-2], v.shape[-1]), heads or (q.shape[1:3] if q.dim() == 5 else None)
    kept = None
    if dropout:
        scores = (*(q.shape[:-2] if heads is None or v.dim() == 3 else v.shape[:2]), q.shape[-2], k.shape[-2])
        kept = _four(F.dropout(torch.ones(scores, dtype=drop_dtype, device=q.device), dropout, True) != 0, heads)
    multiplier, mask = None, _lifted(tensors[0], q.dim(), groups) if tensors and not steps else None
    shown = None
    if steps:
        q, scale, multiplier, mask, shown = _merged(q, steps, tensors, groups)
    q, k, v = (_four(t, heads) for t in (q, k, v))
    if shown is not None:  # a filled score passes no gradient, which matters for a query that sees no key
        q = q.masked_fill(~shown.any(-1, keepdim=True), 0)
    added = steps and mask is not None and mask.dtype is not torch.bool
    if softcap or sink or dropout or added or multiplier is not None:
        options = {"scale": scale, "softcap": softcap, "is_causal": is_causal, "out_dtype": dtype}
        options |= {"multiplier": multiplier, "bias": mask, "keep": kept, "dropout": dropout}
        if sink:
            sinks = sinks.squeeze(-1) if sinks.dim() == 4 else sinks
        out = family.attention(q, k, v, sink=sinks, **options)
    else:
        if k.shape[1] != q.shape[1] and mask is not None:  # with a mask none of the fused kernels takes groups
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        grouped = enable_gqa or k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return (out.contiguous().view(shape) if contiguous else out.reshape(shape)).to(out_dtype)


def _merged(q, steps, tensors, groups):
    """All steps as five: queries that were scaled, a scale, what multiplies the scores, one condition or bias behind
    that, and where scores were not filled."""
    scale, multiplier, mask, shown, tensors = 1.0, None, None, None, iter(tensors)
    wide = torch.promote_types(q.dtype, torch.float32)
    for kind, number, ndim in steps:
        if kind == "scale":
            scale, mask = scale * number, mask if mask is None or mask.dtype is torch.bool else mask * number
        elif kind in ("multiply", "divide"):
            factor = next(tensors)
            factor = 1 / factor if kind == "divide" else factor
            if factor.dim() and factor.shape[-1] != 1:
                multiplier = _lifted(factor, ndim, groups)
            else:
                q = q * factor.to(q.dtype)
            if mask is not None and mask.dtype is not torch.bool:
                mask = mask * _lifted(factor, ndim, groups)
        elif kind in ("add", "subtract"):
            bias = _lifted(next(tensors), ndim, groups)
            bias = -bias if kind == "subtract" else bias
            mask = bias if mask is None else _as_bias(mask) + bias
        elif kind in ("keep", "drop"):
            condition = next(tensors)
            condition = condition if kind == "keep" else ~condition
            visible = _lifted(condition, ndim, groups)
            if number == float("-inf"):
                if mask is None or mask.dtype is torch.bool:
                    mask = visible if mask is None else mask & visible
                else:
                    mask = mask.masked_fill(~visible, number)
                continue
            shown = visible if shown is None else shown & visible
            mask = torch.where(shown, torch.zeros((), dtype=wide, device=q.device), number)
    return q, scale, multiplier, mask, shown


def _as_bias(mask):
    """A condition as what is added to scores."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(~mask, float("-inf"))


def _lifted(tensor, ndim, groups):
    """What broadcasts with scores of `ndim` dimensions, so that it broadcasts with [B, H, Tq, Tk].

    groups: where ndim is 3 and the first is batch * heads, the heads; where it is 5, both dimensions of heads.
    """
    if ndim == 5 and tensor.dim() > 2:
        tensor = tensor[(None,) * (5 - tensor.dim())]
        return (tensor if tensor.shape[1:3] == (1, 1) else tensor.expand(-1, *groups, -1, -1)).flatten(1, 2)
    if ndim != 3 or tensor.dim() != 3:
        return tensor
    return tensor.unflatten(0, (-1, groups)) if groups is not None and tensor.shape[0] != 1 else tensor.unsqueeze(1)


def _four(tensor, heads):
    """[B, H, T, D] of a tensor with other leading dimensions."""
    if tensor.dim() == 5:
        return tensor.flatten(1, 2)
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() == 2:
        return tensor[None, None]
    return tensor.unsqueeze(-3) if heads is None else tensor.unflatten(0, (-1, heads))
