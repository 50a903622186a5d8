"""Attention beyond scaled_dot_product_attention: capped scores, sinks, bias, fills, dropout drawn elsewhere.

    s = max(fill where hidden, else multiplier * softcap(scale * q k^T) + bias; floor),  softcap(z) = c tanh(z / c)
    p = exp(s - lse),  lse = log(sum over keys exp(s) + exp(sink))      a sink takes its share but has no value
    o = (p * kept) v,  kept = keep / (1 - dropout)

Forward keeps one tile of scores at a time: a running maximum and sum, by which what was added up so far is corrected
(online softmax; Milakov and Gimelshein, 2018), as FlashAttention-2 has it (Dao, 2023). Backward computes p anew from
lse. With dp = (do v^T) * kept and delta = rowsum(do * o), which is rowsum(p * dp),

    ds = p * (dp - delta)      dz = scale * multiplier * ds * (1 - (softcap(z) / c)^2)
    dbias = ds, summed where it was broadcast; ds is 0 where a score was filled or below the floor
    dq = dz k      dk = dz^T q      dv = (p * kept)^T do      dsink = -sum over queries exp(sink - lse) * delta

One kernel runs over the keys of a tile of queries, for dq and dbias, another over the queries of all heads that share a
tile of keys, for dk and dv: no atomics, bit-equal on repeat. Where scores are wide (a bias, or a finite fill or floor)
the maximum and the logarithm of the sum are kept apart: finfo.min, by which models hide keys, makes a hidden row's
maximum so large that their sum would be it.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from . import attention_reference, attention_triton
from .common import INTERPRET, compute_dtype, no_autocast, on_device, register, traceable, use_triton


@traceable
def attention(
    q, k, v, *, bias=None, visible=None, sink=None, keep=None, multiplier=None, dropout=0.0, scale=None, softcap=None,
    fill=-math.inf, fill_first=False, floor=-math.inf, is_causal=False, out_dtype=None,
):  # fmt: skip
    """softmax(multiplier * softcap(scale * q k^T) + bias) v in float32 (float64 if a tensor is), no scores in memory.

    q: [B, H, Tq, D], k: [B, G, Tk, D], v: [B, G, Tk, Dv], H a multiple of G: query head h reads head h // (H // G) of k
    and v. Any strides; one of 1 in the last dimension avoids a copy. scale: default D**-0.5. softcap: None or 0: none.
    bias: floats, visible: booleans; multiplier: floats that take no gradient. Each broadcasts to [B, H, Tq, Tk] and is
    never expanded. A score that is not visible becomes the number `fill`: after the bias is added, or before if
    fill_first. Scores below `floor` are raised to it. is_causal: query i sees keys 0 to i, whatever else is given and
    whatever Tq and Tk are. sink: [H], or broadcasts to [B, H, Tq]: one more score of each head or query.
    keep: booleans that broadcast to [B, H, Tq, Tk], what dropout or a mask leaves of the probabilities, which are
    multiplied by 1 / (1 - dropout).
    Returns [B, H, Tq, Dv], contiguous, in out_dtype, default the promoted dtype of q, k and v. A query that sees no key
    is NaN, as softmax has it; with a sink it is 0.
    Triton rounds probabilities to v.dtype before they multiply v; float64, heads above 256 and float32 heads above 128
    (64 with bias and visible) take the reference. Gradients: q, k, v, sink and bias, in the dtype of each. Saves the
    tensors given, the result and one number a row of it, two where scores are wide. Only a bias's gradient takes memory
    for all scores.
    Raises ValueError for shapes that don't fit, dtypes other than these, and dropout without keep or outside [0, 1].
    """
    _check(q, k, v, bias, visible, sink, keep, multiplier, dropout)
    sink = sink.unsqueeze(-1) if sink is not None and sink.dim() == 1 else sink
    out_dtype = out_dtype or torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    scale, softcap = None if scale is None else float(scale), float(softcap) if softcap else None
    largest = torch.finfo(compute_dtype(q, k, v, bias, sink)).max
    fill, floor = (_within(x, largest) for x in (-math.inf if visible is None else fill, floor))
    options = (float(dropout), scale, softcap, fill, fill_first, floor, is_causal)
    return _Attention.apply(q, k, v, bias, visible, sink, keep, multiplier, *options, out_dtype)


def _within(number, largest):
    """The number, or infinity beyond the largest of the dtype that all is computed in."""
    return math.copysign(math.inf, number) if abs(number) > largest else float(number)


def _check(q, k, v, bias, visible, sink, keep, multiplier, dropout):
    if any(t.dim() != 4 for t in (q, k, v)):
        raise ValueError(f"q, k and v must have 4 dimensions, not {q.dim()}, {k.dim()} and {v.dim()}")
    (batch, heads, queries, width), (_, groups, keys, _) = q.shape, k.shape
    if k.shape != (batch, groups, keys, width) or v.shape[:3] != k.shape[:3]:
        shapes = [list(t.shape) for t in (q, k, v)]
        raise ValueError(f"q, k and v must be [B, H, Tq, D], [B, G, Tk, D] and [B, G, Tk, Dv], not {shapes}")
    if groups == 0 or heads % groups:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, not {heads} of {groups}")
    scores = (batch, heads, queries, keys)
    if bias is not None and not bias.dtype.is_floating_point:
        raise ValueError(f"bias must be of floats, not {bias.dtype}")
    for name, given in (("visible", visible), ("keep", keep)):
        if given is not None and given.dtype is not torch.bool:
            raise ValueError(f"{name} must be of booleans, not {given.dtype}")
    if multiplier is not None and (not multiplier.dtype.is_floating_point or multiplier.requires_grad):
        raise ValueError("multiplier must be of floats that require no gradient")
    over_scores = {"bias": bias, "visible": visible, "multiplier": multiplier, "keep": keep}
    for name, given, whole in (*((n, t, scores) for n, t in over_scores.items()), ("sink", sink, scores[:3])):
        if given is None or (name == "sink" and given.shape == (heads,)):
            continue
        fits = given.dim() <= len(whole) and all(
            n in (1, m) for n, m in zip(given.shape[::-1], whole[::-1], strict=False)
        )
        if not fits or (name == "sink" and given.dim() == 1):
            raise ValueError(f"{name} must broadcast to {list(whole)}, its shape is {list(given.shape)}")
    if not 0 <= dropout <= 1 or (dropout and keep is None):
        raise ValueError(f"dropout must be in [0, 1], and 0 without keep, not {dropout}")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, visible, sink, keep, multiplier, *options):
        *ctx.options, _ = options
        out, stats = _forward_op(q, k, v, bias, visible, sink, keep, multiplier, *options)
        ctx.save_for_backward(q, k, v, bias, visible, sink, keep, multiplier, out, stats)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        grads = _backward_op(dout, *ctx.saved_tensors, *ctx.options, *needs)
        found = dict(
            zip(_DIFFERENTIABLE, (g if need else None for g, need in zip(grads, needs, strict=True)), strict=True)
        )
        return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))


_DIFFERENTIABLE = (0, 1, 2, 3, 5)  # q, k, v, bias, sink


def _forward_fake(
    q, k, v, bias, visible, sink, keep, multiplier, dropout, scale, softcap, fill, fill_first, floor, is_causal,
    out_dtype
):  # fmt: skip
    """(out, stats): lse [1, B, H, Tq]; where scores are wide [2, B, H, Tq], the maximum (0 for -inf), lse - maximum."""
    out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=out_dtype)
    wide = bias is not None or fill != -math.inf or floor != -math.inf
    return out, q.new_empty(1 + wide, *q.shape[:3], dtype=compute_dtype(q, k, v, bias, sink))


def _backward_fake(dout, q, k, v, bias, visible, sink, keep, multiplier, out, stats, *options_and_needs):
    needs = options_and_needs[-len(_DIFFERENTIABLE) :]
    return tuple(
        torch.empty_like(t) if need else q.new_empty(0) for t, need in zip((q, k, v, bias, sink), needs, strict=True)
    )


def _forward(q, k, v, bias, visible, sink, keep, multiplier, *options):
    tensors = (q, k, v, bias, visible, sink, keep, multiplier)
    out, stats = _forward_fake(*tensors, *options)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), stats.zero_()
    implementation = attention_triton if _fits_triton(q, k, v, bias, visible, stats) else attention_reference
    with no_autocast(q), on_device(q):
        implementation.forward(*tensors, out, stats, _options(q, *options[:-1]))
    return out, stats


def _backward(dout, q, k, v, bias, visible, sink, keep, multiplier, out, stats, *options_and_needs):
    saved = (q, k, v, bias, visible, sink, keep, multiplier, out, stats)
    grads = _backward_fake(dout, *saved, *options_and_needs)
    if out.numel() == 0 or k.shape[2] == 0:
        return tuple(g.zero_() for g in grads)
    options, needs = options_and_needs[: -len(grads)], options_and_needs[-len(grads) :]
    implementation = attention_triton if _fits_triton(q, k, v, bias, visible, stats) else attention_reference
    with no_autocast(q), on_device(q):
        wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
        implementation.backward(dout, *saved, _options(q, *options), *wanted)
    return grads


def _options(q, dropout, scale, softcap, fill, fill_first, floor, is_causal):
    """Numbers as implementations take them. factor: of the probabilities kept."""
    return {
        "factor": 1 / (1 - dropout) if dropout < 1 else 0.0,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": softcap or 0.0,
        "fill": fill,
        "fill_first": fill_first,
        "floor": floor,
        "is_causal": is_causal,
    }


def _fits_triton(q, k, v, bias, visible, stats):
    dtypes = (q.dtype, k.dtype, v.dtype)
    both = bias is not None and visible is not None  # too many registers for wide heads in float32
    widest = (64 if both else 128) if torch.float32 in dtypes else 256
    broken = INTERPRET and torch.bfloat16 in dtypes  # Triton's interpreter multiplies the bits of bfloat16 as integers
    return use_triton(q) and stats.dtype is torch.float32 and max(q.shape[-1], v.shape[-1]) <= widest and not broken


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? visible, Tensor? sink, Tensor? keep, Tensor? multiplier"
_OPTIONS = "float dropout, float? scale, float? softcap, float fill, bool fill_first, float floor, bool is_causal"
_forward_op = register(
    f"attention_forward({_TENSORS}, {_OPTIONS}, ScalarType out_dtype) -> (Tensor, Tensor)", _forward, _forward_fake
)
_backward_op = register(
    f"attention_backward(Tensor dout, {_TENSORS}, Tensor out, Tensor stats, {_OPTIONS}, bool need_dq, bool need_dk, "
    "bool need_dv, bool need_dbias, bool need_dsink) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
