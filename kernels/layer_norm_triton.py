"""LayerNorm's Triton kernels and their launches; layer_norm.py has the formula, the reference and the operators."""

from .common import (
    MADE_AGAIN,
    MadeAgain,
    Output,
    ceil_div,
    compute_dtype,
    jit,
    launch,
    load_sum,
    memory_order,
    on_device,
    permuted,
    processors,
    row_start,
    rows,
    stages,
    tile,
    tl,
    triton_dtype,
)
from .norm_rows import finish, load_weight, root_share, sum_shares, weighted


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
    DY, DS, X, W, B, MEAN, RSTD, DX, SHARES_W, SHARES_B, Y, count, width,
    y_inner, y_outer, y_step, s_inner, s_outer, s_step, x_inner, x_outer, x_step,
    OFFSET: tl.constexpr, SCALE: tl.constexpr, OUTSIDE: tl.constexpr, ADD: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROUND: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs stride over tiles of whole rows; each leaves its share of dw and db in one row of [programs, width].

    ADD: DS is added to DX. Y: None, or for forward's result once more, which alone needs B.
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
        if Y is not None:
            n = finish(u, X, SCALE, ROUND, ACC)
            if WEIGHT:
                n = n * w
            if BIAS:
                n = n + load_weight(B, column, width, 0.0, ACC)[None, :]
            tl.store(Y + (row.to(tl.int64) * width)[:, None] + column[None, :], n, mask=mask)
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


MADE_AGAIN[_forward_kernel] = MadeAgain("layer_norm", _backward_kernel, "Y", ("MEAN", "RSTD", "W", "B"))


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


def forward(x, residual, weight, bias, outputs, eps, offset, scale, outside, round_before_weight):
    """Write the outputs (y, s, mean, rstd) and return them; s is x itself without a residual."""
    width, compute, (y, s, mean, rstd) = x.shape[-1], compute_dtype(x, residual, weight, bias), outputs
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


def backward(
    dy, ds, x, weight, bias, mean, rstd, outputs, offset, scale, outside, round_before_weight,
    need_dx, need_dw, need_db,
):  # fmt: skip
    """Write the outputs (dx, dw, db), as far as they are needed, and return them."""
    order, width, (dx, dw, db) = memory_order(x), x.shape[-1], outputs
    if x.numel() == 0:
        return dx, dw.zero_(), db.zero_()
    dx = Output(dx, order if need_dx else [0])
    mean, rstd = (permuted(t, order[:-1]).contiguous() for t in (mean, rstd))
    dy, *dy_layout = rows(dy, order)
    s, *s_layout = (dy, *dy_layout) if ds is None else rows(ds, order)
    x, *x_layout = rows(x, order)
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
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
                dy, s, x, weight, bias, mean, rstd, dx.rows, shares_w, shares_b, None, *sizes,
                BIAS=bias is not None, NEED_DX=need_dx, ROWS=ROWS, STAGES=ahead, **sums, **scaled, **flags,
            )  # fmt: skip
        else:
            if need_dx:
                launch(_backward_wide_kernel, count)(dy, s, x, weight, mean, rstd, dx.rows, *sizes, **scaled, **flags)
            if need_dw or need_db:
                grid, sizes = (programs, ceil_div(width, COLUMNS)), (count, width, *dy_layout, *x_layout)
                launch(_weight_wide_kernel, *grid)(dy, x, mean, rstd, shares_w, shares_b, *sizes, **sums, **flags)
        sum_shares(shares_w, shares_b, dw, db)
    return dx.finish(), dw, db
