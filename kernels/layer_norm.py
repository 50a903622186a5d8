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

from .common import (
    Output,
    ceil_div,
    compute_dtype,
    empty_sum,
    jit,
    launch,
    load_sum,
    memory_order,
    no_autocast,
    on_device,
    permuted,
    processors,
    register,
    row_start,
    rows,
    stages,
    tile,
    tl,
    traceable,
    triton_dtype,
    use_triton,
)
from .norm_rows import finish, finished, load_weight, root_share, sum_shares, weighted


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
    Gradients: x in x.dtype, weight in weight.dtype, bias in bias.dtype. Saves x, weight and two numbers a row.
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
    Gradients: one sum for x and residual, cast to the dtype of each. Saves s, weight and two numbers a row.
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
        ctx.save_for_backward(s, weight, mean, rstd)
        ctx.options = (offset, scale, outside, round_before_weight)
        ctx.dtypes = [t if t is None else t.dtype for t in (x, residual, bias)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds=None):
        s, weight, mean, rstd = ctx.saved_tensors
        *need, need_dw, need_db = ctx.needs_input_grad[:4]
        *dtypes, bias_dtype = ctx.dtypes
        dw = db = None
        if dy is not None:
            bias_dtype = bias_dtype if need_db else None
            total, dw, db = _backward_op(
                dy, ds, s, weight, mean, rstd, *ctx.options, any(need), need_dw, bias_dtype
            )  # fmt: skip
            ds, dw, db = total if any(need) else None, dw if need_dw else None, db if need_db else None
        dx, dr = (ds.to(dtype) if n and ds is not None else None for n, dtype in zip(need, dtypes, strict=True))
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
        return _forward_triton(x, residual, weight, bias, *options)
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


def _backward(dy, ds, x, weight, mean, rstd, offset, scale, outside, round_before_weight, need_dx, need_dw, bias_dtype):
    options = (offset, scale, outside, round_before_weight, need_dx, need_dw, bias_dtype)
    if use_triton(x):
        return _backward_triton(dy, ds, x, weight, mean, rstd, *options)
    with no_autocast(x):
        compute = rstd.dtype
        dx, dw, db = _backward_fake(dy, ds, x, weight, mean, rstd, *options)
        g, r = dy.to(compute), rstd.unsqueeze(-1)
        u = (x.to(compute) - mean.unsqueeze(-1)) * r
        if need_dw:
            n = finished(u, x.dtype, scale, round_before_weight)
            dw.copy_((g * n).reshape(-1, x.shape[-1]).sum(0))
        if bias_dtype is not None:
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
    dy, ds, x, weight, mean, rstd, offset, scale, outside, round_before_weight, need_dx, need_dw, bias_dtype
):
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_dw else x.new_empty(0)
    db = x.new_empty(0) if bias_dtype is None else x.new_empty(x.shape[-1:], dtype=bias_dtype)
    return dx, dw, db


@jit
def _moments(x, inside, count):
    """Mean and sum of squared deviations of each row, over its `count` elements inside; x is 0 outside."""
    mean = tl.sum(x, 1) / count
    d = tl.where(inside, x - mean[:, None], 0.0)
    shift = tl.sum(d, 1) / count
    return mean + shift, tl.maximum(tl.sum(d * d, 1) - count * shift * shift, 0.0)


@jit
def _forward_kernel(
    X, R, S, W, B, Y, MEAN, RSTD, count, width, x_inner, x_outer, x_step, r_inner, r_outer, r_step,
    EPS: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, OUTSIDE: tl.constexpr,
    RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROUND: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows; SINGLE: COLUMNS covers the row and x is read once, else in two passes.

    Without RESIDUAL, R and S are X and S is not written.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (row < count)[:, None]
    x_row = X + row_start(row, x_inner, x_outer, x_step)[:, None]
    r_row = R + row_start(row, r_inner, r_outer, r_step)[:, None]
    y_row = Y + (row.to(tl.int64) * width)[:, None]
    s_row = S + (row.to(tl.int64) * width)[:, None]
    column = tl.arange(0, COLUMNS)
    at = column[None, :]
    inside = (column < width)[None, :]
    x = load_sum(x_row + at, r_row + at, S, live & inside, RESIDUAL, ACC)
    mean, square = _moments(x, inside, width if SINGLE else COLUMNS)
    if RESIDUAL:
        tl.store(s_row + at, x, mask=live & inside)
    if not SINGLE:
        for start in range(COLUMNS, width, COLUMNS):
            at = (start + column)[None, :]
            inside = (start + column < width)[None, :]
            x = load_sum(x_row + at, r_row + at, S, live & inside, RESIDUAL, ACC)
            if RESIDUAL:
                tl.store(s_row + at, x, mask=live & inside)
            size = tl.minimum(width - start, COLUMNS)
            tile_mean, tile_square = _moments(x, inside, size)
            delta = tile_mean - mean
            share = size.to(ACC) / (start + size)
            mean += delta * share
            square += tile_square + delta * delta * (start * share)
    if OUTSIDE > 0:
        rstd = 1 / (tl.sqrt(square / width + EPS) + OUTSIDE)
    else:
        rstd = tl.rsqrt(square / width + EPS)
    tl.store(MEAN + row, mean, mask=row < count)
    tl.store(RSTD + row, rstd, mask=row < count)
    for start in range(0, COLUMNS if SINGLE else width, COLUMNS):
        c = start + column
        at = c[None, :]
        mask = live & (c < width)[None, :]
        if not SINGLE:
            x = load_sum(x_row + at, r_row + at, S, mask, RESIDUAL, ACC)
        y = finish((x - mean[:, None]) * rstd[:, None], S, SCALE, ROUND, ACC)
        if WEIGHT:
            y = y * load_weight(W, c, width, OFFSET, ACC)[None, :]
        if BIAS:
            y = y + load_weight(B, c, width, 0.0, ACC)[None, :]
        tl.store(y_row + at, y, mask=mask)


@jit
def _backward_kernel(
    DY, DS, X, W, MEAN, RSTD, DX, SHARES_W, SHARES_B, count, width,
    y_inner, y_outer, y_step, s_inner, s_outer, s_step, x_inner, x_outer, x_step,
    OFFSET: tl.constexpr, SCALE: tl.constexpr, OUTSIDE: tl.constexpr, ADD: tl.constexpr,
    WEIGHT: tl.constexpr, ROUND: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs stride over tiles of whole rows; each leaves its share of dw and db in one row of [programs, width].

    ADD: DS is added to DX.
    """
    column = tl.arange(0, COLUMNS)
    inside = (column < width)[None, :]
    if WEIGHT:
        w = load_weight(W, column, width, OFFSET, ACC)[None, :]
    if NEED_DW:
        total_w = tl.zeros([ROWS, COLUMNS], ACC)
    if NEED_DB:
        total_b = tl.zeros([ROWS, COLUMNS], ACC)
    for first in tl.range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & inside
        x_at = X + row_start(row, x_inner, x_outer, x_step)[:, None] + column[None, :]
        y_at = DY + row_start(row, y_inner, y_outer, y_step)[:, None] + column[None, :]
        x = tl.load(x_at, mask=mask, other=0.0).to(ACC)
        g = tl.load(y_at, mask=mask, other=0.0).to(ACC)
        mean = tl.load(MEAN + row, mask=row < count, other=0.0)[:, None]
        rstd = tl.load(RSTD + row, mask=row < count, other=0.0)[:, None]
        u = (x - mean) * rstd  # not 0 outside, but g is
        if NEED_DW:
            total_w += g * finish(u, X, SCALE, ROUND, ACC)
        if NEED_DB:
            total_b += g
        if NEED_DX:
            if WEIGHT:
                g = g * w
            if SCALE != 1.0:
                g = g * SCALE
            mean_gu = (tl.sum(g * u, 1) / width)[:, None]
            if OUTSIDE > 0:
                mean_gu = mean_gu / root_share(rstd, OUTSIDE)
            dx = rstd * (g - (tl.sum(g, 1) / width)[:, None] - u * mean_gu)
            if ADD:
                s_at = DS + row_start(row, s_inner, s_outer, s_step)[:, None] + column[None, :]
                dx += tl.load(s_at, mask=mask, other=0.0).to(ACC)
            tl.store(DX + (row.to(tl.int64) * width)[:, None] + column[None, :], dx, mask=mask)
    if NEED_DW:
        tl.store(SHARES_W + tl.program_id(0) * width + column, tl.sum(total_w, 0), mask=column < width)
    if NEED_DB:
        tl.store(SHARES_B + tl.program_id(0) * width + column, tl.sum(total_b, 0), mask=column < width)


@jit
def _backward_wide_kernel(
    DY, DS, X, W, MEAN, RSTD, DX, count, width,
    y_inner, y_outer, y_step, s_inner, s_outer, s_step, x_inner, x_outer, x_step,
    OFFSET: tl.constexpr, SCALE: tl.constexpr, OUTSIDE: tl.constexpr, ADD: tl.constexpr,
    WEIGHT: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx of one row that is wider than a tile, in two passes; ADD as in _backward_kernel."""
    row = tl.program_id(0)
    x_row = X + row_start(row, x_inner, x_outer, x_step)
    y_row = DY + row_start(row, y_inner, y_outer, y_step)
    s_row = DS + row_start(row, s_inner, s_outer, s_step)
    mean = tl.load(MEAN + row)
    rstd = tl.load(RSTD + row)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], ACC)
    product = tl.zeros([COLUMNS], ACC)
    for start in range(0, width, COLUMNS):
        c = start + column
        g = tl.load(y_row + c, mask=c < width, other=0.0).to(ACC)
        g = weighted(g, W, c, width, OFFSET, SCALE, WEIGHT, ACC)
        total += g
        product += g * (tl.load(x_row + c, mask=c < width, other=0.0).to(ACC) - mean)
    mean_g = tl.sum(total, 0) / width
    mean_gu = tl.sum(product, 0) * rstd / width
    if OUTSIDE > 0:
        mean_gu = mean_gu / root_share(rstd, OUTSIDE)
    for start in range(0, width, COLUMNS):
        c = start + column
        g = tl.load(y_row + c, mask=c < width, other=0.0).to(ACC)
        g = weighted(g, W, c, width, OFFSET, SCALE, WEIGHT, ACC)
        u = (tl.load(x_row + c, mask=c < width, other=0.0).to(ACC) - mean) * rstd
        dx = rstd * (g - mean_g - u * mean_gu)
        if ADD:
            dx += tl.load(s_row + c, mask=c < width, other=0.0).to(ACC)
        tl.store(DX + row.to(tl.int64) * width + c, dx, mask=c < width)


@jit
def _weight_wide_kernel(
    DY, X, MEAN, RSTD, SHARES_W, SHARES_B, count, width, y_inner, y_outer, y_step, x_inner, x_outer, x_step,
    SCALE: tl.constexpr, ROUND: tl.constexpr, NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
    ACC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dw and db of COLUMNS columns (program axis 1) over every num_programs(0)-th row."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total_w = tl.zeros([COLUMNS], ACC)
    total_b = tl.zeros([COLUMNS], ACC)
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        g = tl.load(DY + row_start(row, y_inner, y_outer, y_step) + column, mask=column < width, other=0.0).to(ACC)
        total_b += g
        if NEED_DW:
            x = tl.load(X + row_start(row, x_inner, x_outer, x_step) + column, mask=column < width, other=0.0).to(ACC)
            u = (x - tl.load(MEAN + row)) * tl.load(RSTD + row)
            total_w += g * finish(u, X, SCALE, ROUND, ACC)
    if NEED_DW:
        tl.store(SHARES_W + tl.program_id(0) * width + column, total_w, mask=column < width)
    if NEED_DB:
        tl.store(SHARES_B + tl.program_id(0) * width + column, total_b, mask=column < width)


def _forward_triton(x, residual, weight, bias, eps, offset, scale, outside, round_before_weight, out_dtype):
    options = (eps, offset, scale, outside, round_before_weight, out_dtype)
    width, compute = x.shape[-1], compute_dtype(x, residual, weight, bias)
    y, s, mean, rstd = _add_forward_fake(x, residual, weight, bias, *options)
    if x.numel() == 0:
        return y, s, mean.zero_(), rstd.zero_()
    order = memory_order(s)
    y, mean, rstd = Output(y, order), Output(mean, order[:-1]), Output(rstd, order[:-1])
    x_rows, *x_layout = rows(x, order)
    if residual is None:
        r_rows, r_layout, s_rows = x_rows, x_layout, x_rows
    else:
        r_rows, *r_layout = rows(residual, order)
        s_out = Output(s, order)
        s_rows = s_out.rows
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    count = x.numel() // width
    ROWS, COLUMNS, warps = tile(width)
    with on_device(x):
        launch(_forward_kernel, ceil_div(count, ROWS))(
            x_rows, r_rows, s_rows, weight, bias, y.rows, mean.rows, rstd.rows, count, width, *x_layout, *r_layout,
            EPS=eps, OFFSET=offset, SCALE=scale, OUTSIDE=outside, RESIDUAL=residual is not None,
            WEIGHT=weight is not None, BIAS=bias is not None, ROUND=round_before_weight, ACC=triton_dtype(compute),
            ROWS=ROWS, COLUMNS=COLUMNS, SINGLE=width <= COLUMNS, num_warps=warps,
        )  # fmt: skip
    return y.finish(), s if residual is None else s_out.finish(), mean.finish(), rstd.finish()


def _backward_triton(
    dy, ds, x, weight, mean, rstd, offset, scale, outside, round_before_weight, need_dx, need_dw, bias_dtype
):
    order, width, need_db = memory_order(x), x.shape[-1], bias_dtype is not None
    options = (offset, scale, outside, round_before_weight, need_dx, need_dw, bias_dtype)
    dx, dw, db = _backward_fake(dy, ds, x, weight, mean, rstd, *options)
    if x.numel() == 0:
        return dx, dw.zero_(), db.zero_()
    dx = Output(dx, order if need_dx else [0])
    mean, rstd = (permuted(t, order[:-1]).contiguous() for t in (mean, rstd))
    dy, *dy_layout = rows(dy, order)
    s, *s_layout = (dy, *dy_layout) if ds is None else rows(ds, order)
    x, *x_layout = rows(x, order)
    weight = weight if weight is None else weight.contiguous()
    count = x.numel() // width
    ROWS, COLUMNS, warps = tile(width, max_width=8192)
    programs, ahead = ceil_div(count, ROWS), 1
    shares_w = shares_b = None
    if need_dw or need_db:
        programs = min(programs, processors(x) * (16 // warps))  # that many fit beside one another
        ahead = stages(ROWS * COLUMNS, dy, x, *([] if ds is None else [s]))
        shares_w, shares_b = (rstd.new_empty(programs, width) if need else None for need in (need_dw, need_db))
    flags = dict(SCALE=scale, ACC=triton_dtype(rstd.dtype), COLUMNS=COLUMNS, num_warps=warps)
    scaled = dict(OFFSET=offset, OUTSIDE=outside, WEIGHT=weight is not None, ADD=ds is not None)
    sums = dict(ROUND=round_before_weight, NEED_DW=need_dw, NEED_DB=need_db)
    sizes = (count, width, *dy_layout, *s_layout, *x_layout)
    with on_device(x):
        if width <= COLUMNS:
            launch(_backward_kernel, programs)(
                dy, s, x, weight, mean, rstd, dx.rows, shares_w, shares_b, *sizes,
                NEED_DX=need_dx, ROWS=ROWS, STAGES=ahead, **sums, **scaled, **flags,
            )  # fmt: skip
        else:
            if need_dx:
                launch(_backward_wide_kernel, count)(dy, s, x, weight, mean, rstd, dx.rows, *sizes, **scaled, **flags)
            if need_dw or need_db:
                grid, sizes = (programs, ceil_div(width, COLUMNS)), (count, width, *dy_layout, *x_layout)
                launch(_weight_wide_kernel, *grid)(dy, x, mean, rstd, shares_w, shares_b, *sizes, **sums, **flags)
        sum_shares(shares_w, shares_b, dw, db)
    return dx.finish(), dw, db


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
    "layer_norm_backward(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, float offset, "
    "float scale, float outside, bool round_before_weight, bool need_dx, bool need_dw, ScalarType? bias_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    traced=True,
)
