"""RMSNorm, alone or of a sum with the residual stream.

    s    = x + residual                          rounded to its dtype; s = x without a residual
    rstd = 1 / max(sqrt(mean(s^2) + eps) + outside, floor) over the last dimension
    n    = scale * s * rstd                      optionally rounded to s's dtype
    y    = n * (offset + weight)

Backward, with u = s * rstd and g = scale * dy * (offset + weight):

    ds += rstd * (g - u * mean(g * u) / (1 - outside * rstd)) without the second term where the floor holds
    dw  = sum over rows of dy * n                partial sums per program, then one sum: no atomics, bit-equal on repeat
"""

import torch
from torch.autograd.function import once_differentiable

from .common import compute_dtype, empty_sum, no_autocast, register, traceable, use_triton
from .norm_rows import finished
from .rms_norm_triton import backward, forward


@traceable
def rms_norm(
    x, weight, eps, *, offset=0.0, round_before_weight=False, out_dtype=None, scale=1.0, floor=0.0, outside=0.0
):
    """Root-mean-square norm over the last dimension, computed in float32 (float64 for float64 inputs).

    x: [..., D], any strides. weight: [D] or None (a weight of 1, and `offset` is ignored). eps, offset: Python numbers.
    round_before_weight: round scale * x * rstd to x.dtype before the weight is applied (models differ in this).
    out_dtype: dtype of the result, default x.dtype. Returns [..., D] in the layout eager elementwise operators give.
    scale, floor: Python numbers, floor >= 0. `x / max(||x||, e)` (torch.nn.functional.normalize) is eps 0, scale
    D**-0.5, floor e * D**-0.5. A row below the floor is only multiplied: no gradient passes through its norm.
    outside: Python number >= 0, added to the root. `x / (rms(x) + e)` (Zhang and Sennrich's own code, 2019) is eps 0,
    outside e. A row of zeros gets the gradient rstd * g there, as from torch.linalg.vector_norm; sqrt would give NaN.
    Gradients: x in x.dtype, weight in weight.dtype. Saves x, weight and one number a row.
    Raises ValueError for a weight of another shape, a negative floor or outside, and where neither of the two is 0.
    """
    _check(x, weight, floor, outside)
    options = (float(eps), float(offset), float(scale), float(floor), float(outside), round_before_weight)
    return _RMSNorm.apply(x, None, weight, *options, out_dtype or x.dtype)


@traceable
def add_rms_norm(
    x, residual, weight, eps, *,
    offset=0.0, round_before_weight=False, out_dtype=None, scale=1.0, floor=0.0, outside=0.0,
):  # fmt: skip
    """(rms_norm(s, weight, ...), s) with s = x + residual, in one pass over memory each way.

    x, residual: [..., D], one shape, any strides. s: [..., D] in promote(x.dtype, residual.dtype), rounded to it before
    the norm, in the layout of eager `x + residual`. The other arguments are those of `rms_norm` with x = s.
    Gradients: one sum for x and residual, cast to the dtype of each. Saves s, weight and one number a row.
    Raises ValueError for shapes that differ and what `rms_norm` raises it for.
    """
    if x.shape != residual.shape:
        raise ValueError(f"x and residual must have the same shape, not {list(x.shape)} and {list(residual.shape)}")
    _check(x, weight, floor, outside)
    out_dtype = out_dtype or torch.promote_types(x.dtype, residual.dtype)
    options = (float(eps), float(offset), float(scale), float(floor), float(outside), round_before_weight)
    return _RMSNorm.apply(x, residual, weight, *options, out_dtype)


def _check(x, weight, floor, outside):
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape [{x.shape[-1]}], as x's last dimension, not {list(weight.shape)}")
    if floor < 0:
        raise ValueError(f"floor must be at least 0, not {floor}")
    if outside < 0:
        raise ValueError(f"outside must be at least 0, not {outside}")
    if floor and outside:
        raise ValueError(f"one of floor and outside must be 0, not {floor} and {outside}")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, scale, floor, outside, round_before_weight, out_dtype):
        options = (eps, offset, scale, floor, outside, round_before_weight, out_dtype)
        if residual is None:
            s = x
            out, rstd = _forward_op(x, weight, *options)
        else:
            y, s, rstd = _add_forward_op(x, residual, weight, *options)
            out = (y, s)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(s, weight, rstd)
        ctx.options = (offset, scale, floor, outside, round_before_weight)
        ctx.dtypes = [t if t is None else t.dtype for t in (x, residual)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds=None):
        s, weight, rstd = ctx.saved_tensors
        *need, need_dw = ctx.needs_input_grad[:3]
        dw = None
        if dy is not None:
            total, dw = _backward_op(dy, ds, s, weight, rstd, *ctx.options, any(need), need_dw)
            ds, dw = total if any(need) else None, dw if need_dw else None
        dx, dr = (ds.to(dtype) if n and ds is not None else None for n, dtype in zip(need, ctx.dtypes, strict=True))
        return dx, dr, dw, None, None, None, None, None, None, None


def _forward(x, weight, *options):
    y, _, rstd = _add_forward(x, None, weight, *options)
    return y, rstd


def _forward_fake(x, weight, *options):
    y, _, rstd = _add_forward_fake(x, None, weight, *options)
    return y, rstd


def _add_forward(x, residual, weight, eps, offset, scale, floor, outside, round_before_weight, out_dtype):
    """(y, s, rstd): s is x itself without a residual; rstd is negative where the floor holds."""
    options = (eps, offset, scale, floor, outside, round_before_weight, out_dtype)
    if use_triton(x):
        return forward(x, residual, weight, _add_forward_fake(x, residual, weight, *options), *options[:-1])
    with no_autocast(x):
        compute = compute_dtype(x, residual, weight)
        y_out, s, rstd_out = _add_forward_fake(x, residual, weight, *options)
        if residual is not None:
            s.copy_(x + residual)
        h = s.to(compute)
        square = h.square().mean(-1) + eps
        rstd = 1 / (square.sqrt() + outside) if outside else torch.rsqrt(square)
        if floor:
            rstd = torch.where(rstd > 1 / floor, -1 / floor, rstd)
        n = finished(h * rstd.abs().unsqueeze(-1), s.dtype, scale, round_before_weight)
        y = n if weight is None else n * (offset + weight.to(compute))
        return y_out.copy_(y), s, rstd_out.copy_(rstd)


def _add_forward_fake(x, residual, weight, eps, offset, scale, floor, outside, round_before_weight, out_dtype):
    compute = compute_dtype(x, residual, weight)
    s = x if residual is None else empty_sum(x, residual)
    return torch.empty_like(s, dtype=out_dtype), s, torch.empty_like(s.select(-1, 0), dtype=compute)


def _backward(dy, ds, x, weight, rstd, offset, scale, floor, outside, round_before_weight, need_dx, need_dw):
    options = (offset, scale, floor, outside, round_before_weight, need_dx, need_dw)
    if use_triton(x):
        outputs = _backward_fake(dy, ds, x, weight, rstd, *options)
        return backward(dy, ds, x, weight, rstd, outputs, *options)
    with no_autocast(x):
        compute = compute_dtype(x, weight)
        dx, dw = _backward_fake(dy, ds, x, weight, rstd, *options)
        g, r = dy.to(compute), rstd.abs().unsqueeze(-1)
        u = x.to(compute) * r
        if need_dw:
            n = finished(u, x.dtype, scale, round_before_weight)
            dw.copy_((g * n).reshape(-1, x.shape[-1]).sum(0))
        if need_dx:
            g = g if weight is None else g * (offset + weight.to(compute))
            g = g if scale == 1.0 else g * scale
            mean = (g * u).mean(-1, keepdim=True)
            if floor:
                mean = torch.where(rstd.unsqueeze(-1) > 0, mean, 0)
            if outside:
                share = 1 - outside * r  # as root_share
                mean = mean / torch.where(share > 0, share, 1)
            d = r * (g - u * mean)
            dx.copy_(d if ds is None else d + ds)
        return dx, dw


def _backward_fake(dy, ds, x, weight, rstd, offset, scale, floor, outside, round_before_weight, need_dx, need_dw):
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_dw else x.new_empty(0)
    return dx, dw


_OPTIONS = (
    "float eps, float offset, float scale, float floor, float outside, bool round_before_weight, ScalarType out_dtype"
)
_forward_op = register(
    f"rms_norm_forward(Tensor x, Tensor? weight, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    traced=True,
)
_add_forward_op = register(
    f"add_rms_norm_forward(Tensor x, Tensor residual, Tensor? weight, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _add_forward,
    _add_forward_fake,
    traced=True,
)
_backward_op = register(
    "rms_norm_backward(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor rstd, float offset, float scale, "
    "float floor, float outside, bool round_before_weight, bool need_dx, bool need_dw) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    traced=True,
)
