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

from .common import (
    MADE_AGAIN,
    MadeAgain,
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
        return _forward_triton(x, residual, weight, *options)
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
        return _backward_triton(dy, ds, x, weight, rstd, *options)
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


@jit
def _forward_kernel(
    X, R, S, W, Y, RSTD, count, width, x_inner, x_outer, x_step, r_inner, r_outer, r_step,
    EPS: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr, OUTSIDE: tl.constexpr,
    RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, ROUND: tl.constexpr, ACC: tl.constexpr,
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
    mask = live & (column < width)[None, :]
    x = load_sum(x_row + at, r_row + at, S, mask, RESIDUAL, ACC)
    square = tl.sum(x * x, 1)
    if RESIDUAL:
        tl.store(s_row + at, x, mask=mask)
    if not SINGLE:
        for start in range(COLUMNS, width, COLUMNS):
            at = (start + column)[None, :]
            mask = live & (start + column < width)[None, :]
            x = load_sum(x_row + at, r_row + at, S, mask, RESIDUAL, ACC)
            square += tl.sum(x * x, 1)
            if RESIDUAL:
                tl.store(s_row + at, x, mask=mask)
    if OUTSIDE > 0:
        rstd = 1 / (tl.sqrt(square / width + EPS) + OUTSIDE)
    else:
        rstd = tl.rsqrt(square / width + EPS)
    if FLOOR > 0:
        rstd = tl.where(rstd > 1 / FLOOR, -1 / FLOOR, rstd)
    tl.store(RSTD + row, rstd, mask=row < count)
    if FLOOR > 0:
        rstd = tl.abs(rstd)
    for start in range(0, COLUMNS if SINGLE else width, COLUMNS):
        c = start + column
        at = c[None, :]
        mask = live & (c < width)[None, :]
        if not SINGLE:
            x = load_sum(x_row + at, r_row + at, S, mask, RESIDUAL, ACC)
        n = finish(x * rstd[:, None], S, SCALE, ROUND, ACC)
        if WEIGHT:
            n = n * load_weight(W, c, width, OFFSET, ACC)[None, :]
        tl.store(y_row + at, n, mask=mask)


@jit
def _backward_kernel(
    DY, DS, X, W, RSTD, DX, SHARES, Y, count, width,
    y_inner, y_outer, y_step, s_inner, s_outer, s_step, x_inner, x_outer, x_step,
    OFFSET: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr, OUTSIDE: tl.constexpr, ADD: tl.constexpr,
    WEIGHT: tl.constexpr, ROUND: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs stride over tiles of whole rows; each leaves its share of dw in one row of SHARES [programs, width].

    ADD: DS is added to DX. FLOOR: RSTD is negative where the floor holds. Y: None, or for forward's result once more.
    """
    column = tl.arange(0, COLUMNS)
    inside = (column < width)[None, :]
    if WEIGHT:
        w = load_weight(W, column, width, OFFSET, ACC)[None, :]
    if NEED_DW:
        total = tl.zeros([ROWS, COLUMNS], ACC)
    for first in tl.range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & inside
        x_at = X + row_start(row, x_inner, x_outer, x_step)[:, None] + column[None, :]
        y_at = DY + row_start(row, y_inner, y_outer, y_step)[:, None] + column[None, :]
        x = tl.load(x_at, mask=mask, other=0.0).to(ACC)
        g = tl.load(y_at, mask=mask, other=0.0).to(ACC)
        rstd = tl.load(RSTD + row, mask=row < count, other=0.0)[:, None]
        free = rstd > 0
        if FLOOR > 0:
            rstd = tl.abs(rstd)
        u = x * rstd
        if Y is not None:
            n = finish(u, X, SCALE, ROUND, ACC)
            if WEIGHT:
                n = n * w
            tl.store(Y + (row.to(tl.int64) * width)[:, None] + column[None, :], n, mask=mask)
        if NEED_DW:
            total += g * finish(u, X, SCALE, ROUND, ACC)
        if NEED_DX:
            if WEIGHT:
                g = g * w
            if SCALE != 1.0:
                g = g * SCALE
            mean = (tl.sum(g * u, 1) / width)[:, None]
            if FLOOR > 0:
                mean = tl.where(free, mean, 0.0)
            if OUTSIDE > 0:
                mean = mean / root_share(rstd, OUTSIDE)
            dx = rstd * (g - u * mean)
            if ADD:
                s_at = DS + row_start(row, s_inner, s_outer, s_step)[:, None] + column[None, :]
                dx += tl.load(s_at, mask=mask, other=0.0).to(ACC)
            tl.store(DX + (row.to(tl.int64) * width)[:, None] + column[None, :], dx, mask=mask)
    if NEED_DW:
        tl.store(SHARES + tl.program_id(0) * width + column, tl.sum(total, 0), mask=column < width)


MADE_AGAIN[_forward_kernel] = MadeAgain(_backward_kernel, "Y", ("RSTD", "W"))


@jit
def _backward_wide_kernel(
    DY, DS, X, W, RSTD, DX, count, width,
    y_inner, y_outer, y_step, s_inner, s_outer, s_step, x_inner, x_outer, x_step,
    OFFSET: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr, OUTSIDE: tl.constexpr, ADD: tl.constexpr,
    WEIGHT: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx of one row that is wider than a tile, in two passes; ADD and FLOOR as in _backward_kernel."""
    row = tl.program_id(0)
    x_row = X + row_start(row, x_inner, x_outer, x_step)
    y_row = DY + row_start(row, y_inner, y_outer, y_step)
    s_row = DS + row_start(row, s_inner, s_outer, s_step)
    rstd = tl.load(RSTD + row)
    free = rstd > 0
    if FLOOR > 0:
        rstd = tl.abs(rstd)
    column = tl.arange(0, COLUMNS)
    product = tl.zeros([COLUMNS], ACC)
    for start in range(0, width, COLUMNS):
        c = start + column
        g = tl.load(y_row + c, mask=c < width, other=0.0).to(ACC)
        g = weighted(g, W, c, width, OFFSET, SCALE, WEIGHT, ACC)
        product += g * tl.load(x_row + c, mask=c < width, other=0.0).to(ACC)
    mean = tl.sum(product, 0) * rstd / width
    if FLOOR > 0:
        mean = tl.where(free, mean, 0.0)
    if OUTSIDE > 0:
        mean = mean / root_share(rstd, OUTSIDE)
    for start in range(0, width, COLUMNS):
        c = start + column
        g = tl.load(y_row + c, mask=c < width, other=0.0).to(ACC)
        g = weighted(g, W, c, width, OFFSET, SCALE, WEIGHT, ACC)
        u = tl.load(x_row + c, mask=c < width, other=0.0).to(ACC) * rstd
        dx = rstd * (g - u * mean)
        if ADD:
            dx += tl.load(s_row + c, mask=c < width, other=0.0).to(ACC)
        tl.store(DX + row.to(tl.int64) * width + c, dx, mask=c < width)


@jit
def _weight_wide_kernel(
    DY, X, RSTD, SHARES, count, width, y_inner, y_outer, y_step, x_inner, x_outer, x_step,
    SCALE: tl.constexpr, FLOOR: tl.constexpr, ROUND: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dw of COLUMNS columns (program axis 1) over every num_programs(0)-th row."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], ACC)
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        x = tl.load(X + row_start(row, x_inner, x_outer, x_step) + column, mask=column < width, other=0.0).to(ACC)
        g = tl.load(DY + row_start(row, y_inner, y_outer, y_step) + column, mask=column < width, other=0.0).to(ACC)
        rstd = tl.load(RSTD + row)
        if FLOOR > 0:
            rstd = tl.abs(rstd)
        total += g * finish(x * rstd, X, SCALE, ROUND, ACC)
    tl.store(SHARES + tl.program_id(0) * width + column, total, mask=column < width)


def _forward_triton(x, residual, weight, eps, offset, scale, floor, outside, round_before_weight, out_dtype):
    options = (eps, offset, scale, floor, outside, round_before_weight, out_dtype)
    width, compute = x.shape[-1], compute_dtype(x, residual, weight)
    y, s, rstd = _add_forward_fake(x, residual, weight, *options)
    if x.numel() == 0:
        return y, s, rstd.zero_()
    order = memory_order(s)
    y, rstd = Output(y, order), Output(rstd, order[:-1])
    x_rows, *x_layout = rows(x, order)
    if residual is None:
        r_rows, r_layout, s_rows = x_rows, x_layout, x_rows
    else:
        r_rows, *r_layout = rows(residual, order)
        s_out = Output(s, order)
        s_rows = s_out.rows
    weight = weight if weight is None else weight.contiguous()
    count = x.numel() // width
    ROWS, COLUMNS, warps = tile(width)
    with on_device(x):
        launch(_forward_kernel, ceil_div(count, ROWS))(
            x_rows, r_rows, s_rows, weight, y.rows, rstd.rows, count, width, *x_layout, *r_layout,
            EPS=eps, OFFSET=offset, SCALE=scale, FLOOR=floor, OUTSIDE=outside, RESIDUAL=residual is not None,
            WEIGHT=weight is not None, ROUND=round_before_weight, ACC=triton_dtype(compute),
            ROWS=ROWS, COLUMNS=COLUMNS, SINGLE=width <= COLUMNS, num_warps=warps,
        )  # fmt: skip
    return y.finish(), s if residual is None else s_out.finish(), rstd.finish()


def _backward_triton(dy, ds, x, weight, rstd, offset, scale, floor, outside, round_before_weight, need_dx, need_dw):
    order, width, compute = memory_order(x), x.shape[-1], compute_dtype(x, weight)
    options = (offset, scale, floor, outside, round_before_weight, need_dx, need_dw)
    dx, dw = _backward_fake(dy, ds, x, weight, rstd, *options)
    if x.numel() == 0:
        return dx, dw.zero_()
    dx = Output(dx, order if need_dx else [0])
    rstd = permuted(rstd, order[:-1]).contiguous()
    dy, *dy_layout = rows(dy, order)
    s, *s_layout = (dy, *dy_layout) if ds is None else rows(ds, order)
    x, *x_layout = rows(x, order)
    weight = weight if weight is None else weight.contiguous()
    count = x.numel() // width
    ROWS, COLUMNS, warps = tile(width, max_width=8192)
    programs, ahead, shares = ceil_div(count, ROWS), 1, None
    if need_dw:
        programs = min(programs, processors(x) * (16 // warps))  # that many fit beside one another
        ahead = stages(ROWS * COLUMNS, dy, x, *([] if ds is None else [s]))
        shares = x.new_empty(programs, width, dtype=compute)
    flags = dict(SCALE=scale, FLOOR=floor, ACC=triton_dtype(compute), COLUMNS=COLUMNS, num_warps=warps)
    scaled = dict(OFFSET=offset, OUTSIDE=outside, WEIGHT=weight is not None, ADD=ds is not None)
    sizes = (count, width, *dy_layout, *s_layout, *x_layout)
    with on_device(x):
        if width <= COLUMNS:
            launch(_backward_kernel, programs)(
                dy, s, x, weight, rstd, dx.rows, shares, None, *sizes,
                ROUND=round_before_weight, NEED_DX=need_dx, NEED_DW=need_dw, ROWS=ROWS, STAGES=ahead, **scaled, **flags,
            )  # fmt: skip
        else:
            if need_dx:
                launch(_backward_wide_kernel, count)(dy, s, x, weight, rstd, dx.rows, *sizes, **scaled, **flags)
            if need_dw:
                grid, sizes = (programs, ceil_div(width, COLUMNS)), (count, width, *dy_layout, *x_layout)
                launch(_weight_wide_kernel, *grid)(dy, x, rstd, shares, *sizes, ROUND=round_before_weight, **flags)
        sum_shares(shares, None, dw, None)
    return dx.finish(), dw


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
