"""RMSNorm's Triton kernels and their launches; rms_norm.py has the formula, the reference and the operators."""

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


MADE_AGAIN[_forward_kernel] = MadeAgain("rms_norm", _backward_kernel, "Y", ("RSTD", "W"))


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


def forward(x, residual, weight, outputs, eps, offset, scale, floor, outside, round_before_weight):
    """Write the outputs (y, s, rstd) and return them; s is x itself without a residual."""
    width, (y, s, rstd) = x.shape[-1], outputs
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
            WEIGHT=weight is not None, ROUND=round_before_weight, ACC=triton_dtype(compute_dtype(x, residual, weight)),
            ROWS=ROWS, COLUMNS=COLUMNS, SINGLE=width <= COLUMNS, num_warps=warps,
        )  # fmt: skip
    return y.finish(), s if residual is None else s_out.finish(), rstd.finish()


def backward(
    dy, ds, x, weight, rstd, outputs, offset, scale, floor, outside, round_before_weight, need_dx, need_dw
):  # fmt: skip
    """Write the outputs (dx, dw), as far as they are needed, and return them."""
    order, width, compute, (dx, dw) = memory_order(x), x.shape[-1], compute_dtype(x, weight), outputs
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
