"""Scaled dot-product attention as models write it: `softmax(steps(q k^T)) v`, with the steps as data.

A call of PyTorch's scaled_dot_product_attention where that can say it, else of our own kernel (attention.py). Not a
kernel itself: it puts the steps together, and what it calls is differentiable.
"""

import math

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
    holds or "drop" them where it does: they become the number; "floor" raises them to the number. Then, done to the
    probabilities: "retain" them where a condition holds or "remove" them where it does: they become 0.
    tensors: a sink if `sink`, then one for each step that needs it; without steps, maybe PyTorch's attn_mask. scale: of
    the scores before all steps. transposed: k is [..., D, Tk]. heads: the leading dimension of q and k, and maybe of v,
    is batch * heads. k and v may have fewer heads than q. softcap: the number of the step "cap". sink: [H], or
    broadcasts to [B, H, Tq] or [B, H, Tq, 1]. dropout: probabilities are dropped as `F.dropout` drops a tensor of
    drop_dtype, with the same random numbers. dtype: q, k and v are rounded to it first, default what they promote to.
    contiguous: the layout of a matrix product, else that of scaled_dot_product_attention. Returns [..., Tq, Dv] in
    out_dtype.

    A mask by a finite number is our kernel's: PyTorch's fused ones keep the maximum and the logarithm of the sum as one
    number, in which the latter is lost, and give queries that see no key a wrong gradient.
    """
    k = k.transpose(-2, -1) if transposed else k
    sinks, *tensors = tensors if sink else (None, *tensors)
    dtype = dtype or torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    lead = q.shape[:-2] if heads is None or v.dim() == 3 else (-1, heads)
    shape, groups = (*lead, q.shape[-2], v.shape[-1]), heads or (q.shape[1:3] if q.dim() == 5 else None)
    keep = None
    if dropout:
        scores = (*(q.shape[:-2] if heads is None or v.dim() == 3 else v.shape[:2]), q.shape[-2], k.shape[-2])
        keep = _four(F.dropout(torch.ones(scores, dtype=drop_dtype, device=q.device), dropout, True) != 0, heads)
    merged = {}
    if steps:
        q, scale, merged = _merged(q, steps, tensors, groups)
    elif tensors:
        merged = {"visible": _lifted(tensors[0], q.dim(), groups)}
    retained = merged.pop("retained", None)
    if retained is not None:
        keep = retained if keep is None else keep & retained
    q, k, v = (_four(t, heads) for t in (q, k, v))
    if softcap or sink or keep is not None or merged.keys() - {"visible"}:
        if sink:
            sinks = sinks.squeeze(-1) if sinks.dim() == 4 else sinks
        options = {"scale": scale, "softcap": softcap, "is_causal": is_causal, "out_dtype": dtype, "dropout": dropout}
        out = family.attention(q, k, v, sink=sinks, keep=keep, **merged, **options)
    else:
        mask = merged.get("visible")
        if k.shape[1] != q.shape[1] and mask is not None:  # with a mask none of the fused kernels takes groups
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        grouped = enable_gqa or k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    if retained is not None:  # a query that sees no key is NaN before it is removed
        out = out.masked_fill(~retained.any(-1, keepdim=True), 0)
    return (out.contiguous().view(shape) if contiguous else out.reshape(shape)).to(out_dtype)


def _merged(q, steps, tensors, groups):
    """(queries that were scaled, a scale, all other steps as options of our kernel, and what is retained).

    Scores are kept as where(visible, z + inner, fill) + outer, z being scaled and multiplied; then the floor.
    """
    tensors = iter(tensors)
    scale = 1.0
    multiplier = visible = fill = floor = inner = outer = retained = None
    for kind, number, ndim in steps:
        tensor = next(tensors) if kind not in ("scale", "cap", "floor") else None
        if kind == "scale":
            scale *= number
            fill, floor, inner, outer = (x if x is None else x * number for x in (fill, floor, inner, outer))
        elif kind in ("multiply", "divide"):
            factor = 1 / tensor if kind == "divide" else tensor
            if factor.dim() and factor.shape[-1] != 1:
                multiplier = _lifted(factor, ndim, groups)
            else:
                q = q * factor.to(q.dtype)
            inner = inner if inner is None else inner * _lifted(factor, ndim, groups)
        elif kind in ("add", "subtract"):
            bias = _lifted(tensor, ndim, groups)
            bias = -bias if kind == "subtract" else bias
            if fill in (None, -math.inf):
                inner = _sum(inner, bias)
            else:
                outer = _sum(outer, bias)
        elif kind in ("keep", "drop"):
            shown = _lifted(tensor if kind == "keep" else ~tensor, ndim, groups)
            if fill in (None, number):
                visible, fill = _both(visible, shown), number
                outer = outer if outer is None else outer.masked_fill(~shown, 0)
            elif number == -math.inf:
                outer = _hidden(outer, shown)
            else:
                inner, visible, fill = _hidden(inner, visible), shown, number
        elif kind == "floor":
            floor = number if floor is None else max(floor, number)
        elif kind in ("retain", "remove"):
            retained = _both(retained, _lifted(tensor if kind == "retain" else ~tensor, ndim, groups))
    if inner is not None and outer is not None:
        inner, outer = None, inner.masked_fill(~visible, 0) + outer
    options = {"visible": visible, "multiplier": multiplier, "bias": _sum(inner, outer), "retained": retained}
    options["floor"] = floor
    if fill not in (None, -math.inf):
        options |= {"fill": fill, "fill_first": outer is not None}
    return q, scale, {name: value for name, value in options.items() if value is not None}


def _sum(a, b):
    return b if a is None else a if b is None else a + b


def _both(a, b):
    return b if a is None else a & b


def _hidden(bias, visible):
    """The bias, or 0, where visible, -inf elsewhere."""
    if bias is None:
        bias = torch.zeros((), dtype=torch.float32, device=visible.device)
    return bias.masked_fill(~visible, -math.inf)


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
