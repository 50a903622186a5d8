"""LayerNorm, alone or of a sum with the residual stream.

    s    = x + residual                          rounded to its dtype; s = x without a residual
    rstd = 1 / (sqrt(var + eps) + outside)       over the last dimension, var = mean((s - mean)^2)
    n    = scale * (s - mean) * rstd             optionally rounded to s's dtype
    y    = n * (offset + weight) + bias

Mean and variance come from the corrected two-pass algorithm in registers (Chan, Golub and LeVeque, 1983); rows wider
than a tile combine the moments of their tiles, so no sum of squares ever cancels.

Backward, with u = (s - mean) * rstd and g = scale * dy * (offset + weight):

    ds += rstd * (g - mean(g) - u * mean(g * u) / (1 - outside * rstd))
    dw  = sum over rows of dy * n                partial sums per program, then one sum: no atomics, bit-equal on repeat
    db  = sum over rows of dy
"""

import torch
from torch.autograd.function import once_differentiable

from .common import compute_dtype, empty_sum, no_autocast, register, traceable, use_triton
from .layer_norm_triton import backward, forward
from .norm_rows import finished


@traceable
def layer_norm(x, weight, bias, eps, *, offset=0.0, round_before_weight=False, out_dtype=None, scale=1.0, outside=0.0):
    """Layer norm over the last dimension, computed in float32 (float64 for float64 inputs).

    x: [..., D], any strides. weight: [D] or None (a weight of 1, and `offset` is ignored). bias: [D] or None.
    eps, offset: Python numbers. round_before_weight: round scale * (x - mean) * rstd to x.dtype before the weight.
    out_dtype: dtype of the result, default x.dtype. Returns [..., D] in the layout eager elementwise operators give.
    scale, outside: Python numbers, outside >= 0 is added to the root. `(x - mean) / (x.std(-1) + e)` (The Annotated
    Transformer) is eps 0, scale 1 / k, outside e / k, where k = (D / (D - 1))**0.5 makes torch.std's unbiased root of
    the biased one. A row of equal numbers gets the gradient rstd * (g - mean(g)) there, as from torch.std; sqrt would
    give NaN.
    Gradients: x in x.dtype, weight in weight.dtype, bias in bias.dtype. Saves x, weight, bias and two numbers a row.
    Raises ValueError for a weight or bias of another shape and a negative outside.
    """
    _check(x, weight, bias, outside)
    options = (float(eps), float(offset), float(scale), float(outside), round_before_weight, out_dtype or x.dtype)
    return _LayerNorm.apply(x, None, weight, bias, *options)


@traceable
def add_layer_norm(
    x, residual, weight, bias, eps, *, offset=0.0, round_before_weight=False, out_dtype=None, scale=1.0, outside=0.0
):
    """(layer_norm(s, weight, bias, ...), s) with s = x + residual, in one pass over memory each way.

    x, residual: [..., D], one shape, any strides. s: [..., D] in promote(x.dtype, residual.dtype), rounded to it before
    the norm, in the layout of eager `x + residual`. The other arguments are those of `layer_norm` with x = s.
    Gradients: one sum for x and residual, cast to the dtype of each. Saves s, weight, bias and two numbers a row.
    Raises ValueError for shapes that differ and what `layer_norm` raises it for.
    """
    if x.shape != residual.shape:
        raise ValueError(f"x and residual must have the same shape, not {list(x.shape)} and {list(residual.shape)}")
    _check(x, weight, bias, outside)
    out_dtype = out_dtype or torch.promote_types(x.dtype, residual.dtype)
    options = (float(eps), float(offset), float(scale), float(outside), round_before_weight, out_dtype)
    return _LayerNorm.apply(x, residual, weight, bias, *options)


def _check(x, weight, bias, outside):
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape [{x.shape[-1]}], as x's last dimension, not {list(t.shape)}")
    if outside < 0:
        raise ValueError(f"outside must be at least 0, not {outside}")


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, offset, scale, outside, round_before_weight, out_dtype):
        options = (eps, offset, scale, outside, round_before_weight, out_dtype)
        if residual is None:
            s = x
            out, mean, rstd = _forward_op(x, weight, bias, *options)
        else:
            y, s, mean, rstd = _add_forward_op(x, residual, weight, bias, *options)
            out = (y, s)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(s, weight, bias, mean, rstd)
        ctx.options = (offset, scale, outside, round_before_weight)
        ctx.dtypes = [t if t is None else t.dtype for t in (x, residual)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds=None):
        *need, need_dw, need_db = ctx.needs_input_grad[:4]
        dw = db = None
        if dy is not None:
            total, dw, db = _backward_op(dy, ds, *ctx.saved_tensors, *ctx.options, any(need), need_dw, need_db)
            ds, dw, db = total if any(need) else None, dw if need_dw else None, db if need_db else None
        dx, dr = (ds.to(dtype) if n and ds is not None else None for n, dtype in zip(need, ctx.dtypes, strict=True))
        return dx, dr, dw, db, None, None, None, None, None, None


def _forward(x, weight, bias, *options):
    y, _, mean, rstd = _add_forward(x, None, weight, bias, *options)
    return y, mean, rstd


def _forward_fake(x, weight, bias, *options):
    y, _, mean, rstd = _add_forward_fake(x, None, weight, bias, *options)
    return y, mean, rstd


def _add_forward(x, residual, weight, bias, eps, offset, scale, outside, round_before_weight, out_dtype):
    """(y, s, mean, rstd): s is x itself without a residual."""
    options = (eps, offset, scale, outside, round_before_weight, out_dtype)
    if use_triton(x):
        outputs = _add_forward_fake(x, residual, weight, bias, *options)
        return forward(x, residual, weight, bias, outputs, *options[:-1])
    with no_autocast(x):
        compute = compute_dtype(x, residual, weight, bias)
        y_out, s, mean_out, rstd_out = _add_forward_fake(x, residual, weight, bias, *options)
        if residual is not None:
            s.copy_(x + residual)
        h = s.to(compute)
        mean = h.mean(-1)
        d = h - mean.unsqueeze(-1)
        square = d.square().mean(-1) + eps
        rstd = 1 / (square.sqrt() + outside) if outside else torch.rsqrt(square)
        y = finished(d * rstd.unsqueeze(-1), s.dtype, scale, round_before_weight)
        if weight is not None:
            y = y * (offset + weight.to(compute))
        if bias is not None:
            y = y + bias.to(compute)
        return y_out.copy_(y), s, mean_out.copy_(mean), rstd_out.copy_(rstd)


def _add_forward_fake(x, residual, weight, bias, eps, offset, scale, outside, round_before_weight, out_dtype):
    compute = compute_dtype(x, residual, weight, bias)
    s = x if residual is None else empty_sum(x, residual)
    mean, rstd = (torch.empty_like(s.select(-1, 0), dtype=compute) for _ in range(2))
    return torch.empty_like(s, dtype=out_dtype), s, mean, rstd


def _backward(
    dy, ds, x, weight, bias, mean, rstd, offset, scale, outside, round_before_weight, need_dx, need_dw, need_db
):  # fmt: skip
    given = (dy, ds, x, weight, bias, mean, rstd)
    options = (offset, scale, outside, round_before_weight, need_dx, need_dw, need_db)
    dx, dw, db = outputs = _backward_fake(*given, *options)
    if use_triton(x):
        return backward(*given, outputs, *options)
    with no_autocast(x):
        compute = rstd.dtype
        g, r = dy.to(compute), rstd.unsqueeze(-1)
        u = (x.to(compute) - mean.unsqueeze(-1)) * r
        if need_dw:
            n = finished(u, x.dtype, scale, round_before_weight)
            dw.copy_((g * n).reshape(-1, x.shape[-1]).sum(0))
        if need_db:
            db.copy_(g.reshape(-1, x.shape[-1]).sum(0))
        if need_dx:
            g = g if weight is None else g * (offset + weight.to(compute))
            g = g if scale == 1.0 else g * scale
            mean_gu = (g * u).mean(-1, keepdim=True)
            if outside:
                share = 1 - outside * r  # as root_share
                mean_gu = mean_gu / torch.where(share > 0, share, 1)
            d = r * (g - g.mean(-1, keepdim=True) - u * mean_gu)
            dx.copy_(d if ds is None else d + ds)
        return dx, dw, db


def _backward_fake(
    dy, ds, x, weight, bias, mean, rstd, offset, scale, outside, round_before_weight, need_dx, need_dw, need_db
):  # fmt: skip
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dw, db = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for t, need in ((weight, need_dw), (bias, need_db))
    )
    return dx, dw, db


_OPTIONS = "float eps, float offset, float scale, float outside, bool round_before_weight, ScalarType out_dtype"
_forward_op = register(
    f"layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    traced=True,
)
_add_forward_op = register(
    f"add_layer_norm_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _add_forward,
    _add_forward_fake,
    traced=True,
)
_backward_op = register(
    "layer_norm_backward(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "float offset, float scale, float outside, bool round_before_weight, bool need_dx, bool need_dw, bool need_db) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    traced=True,
)
