"""RMSNorm.

    rstd = 1 / sqrt(mean(x^2) + eps)         over the last dimension
    n    = x * rstd                          optionally rounded to x's dtype
    y    = n * (offset + weight)

Backward, with g = dy * (offset + weight):

    dx = rstd * (g - n * mean(g * n))
    dw = sum over rows of dy * n             partial sums per program, then one sum: no atomics, bit-equal on repeat
"""

import torch
from torch.autograd.function import once_differentiable

from .common import (
    Output,
    ceil_div,
    compute_dtype,
    jit,
    memory_order,
    no_autocast,
    on_device,
    processors,
    register,
    row_start,
    rows,
    tile,
    tl,
    traceable,
    triton_dtype,
    use_triton,
)


@traceable
def rms_norm(x, weight, eps, *, offset=0.0, round_before_weight=False, out_dtype=None):
    """Root-mean-square norm over the last dimension, computed in float32 (float64 for float64 inputs).

    x: [..., D], any strides. weight: [D] or None (a weight of 1, and `offset` is ignored). eps, offset: Python numbers.
    round_before_weight: round x * rstd to x.dtype before the weight is applied (models differ in this).
    out_dtype: dtype of the result, default x.dtype. Returns [..., D] in the layout eager elementwise operators give.
    Gradients: x in x.dtype, weight in weight.dtype. Saves x, weight and one number a row.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape [{x.shape[-1]}], as x's last dimension, not {list(weight.shape)}")
    return _RMSNorm.apply(x, weight, float(eps), float(offset), round_before_weight, out_dtype or x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, round_before_weight, out_dtype):
        y, rstd = _forward_op(x, weight, eps, offset, round_before_weight, out_dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.round_before_weight = offset, round_before_weight
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dx, dw = _backward_op(dy, x, weight, rstd, ctx.offset, ctx.round_before_weight, need_dx, need_dw)
        return dx if need_dx else None, dw if need_dw else None, None, None, None, None


def _forward(x, weight, eps, offset, round_before_weight, out_dtype):
    if use_triton(x):
        return _forward_triton(x, weight, eps, offset, round_before_weight, out_dtype)
    with no_autocast(x):
        compute = compute_dtype(x, weight)
        h = x.to(compute)
        rstd = torch.rsqrt(h.square().mean(-1) + eps)
        n = h * rstd.unsqueeze(-1)
        if round_before_weight:
            n = n.to(x.dtype).to(compute)
        y = n if weight is None else n * (offset + weight.to(compute))
        y_out, rstd_out = _forward_fake(x, weight, eps, offset, round_before_weight, out_dtype)
        return y_out.copy_(y), rstd_out.copy_(rstd)


def _forward_fake(x, weight, eps, offset, round_before_weight, out_dtype):
    return torch.empty_like(x, dtype=out_dtype), torch.empty_like(x.select(-1, 0), dtype=compute_dtype(x, weight))


def _backward(dy, x, weight, rstd, offset, round_before_weight, need_dx, need_dw):
    if use_triton(x):
        return _backward_triton(dy, x, weight, rstd, offset, round_before_weight, need_dx, need_dw)
    with no_autocast(x):
        compute = compute_dtype(x, weight)
        dx, dw = _backward_fake(dy, x, weight, rstd, offset, round_before_weight, need_dx, need_dw)
        g, r = dy.to(compute), rstd.unsqueeze(-1)
        n = x.to(compute) * r
        if need_dw:
            rounded = n.to(x.dtype).to(compute) if round_before_weight else n
            dw.copy_((g * rounded).reshape(-1, x.shape[-1]).sum(0))
        if need_dx:
            g = g if weight is None else g * (offset + weight.to(compute))
            dx.copy_(r * (g - n * (g * n).mean(-1, keepdim=True)))
        return dx, dw


def _backward_fake(dy, x, weight, rstd, offset, round_before_weight, need_dx, need_dw):
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_dw else x.new_empty(0)
    return dx, dw


@jit
def _load_weight(W, column, width, OFFSET: tl.constexpr, ACC: tl.constexpr):
    return OFFSET + tl.load(W + column, mask=column < width, other=0.0).to(ACC)


@jit
def _forward_kernel(
    X, W, Y, RSTD, count, width, x_inner, x_outer, x_step,
    EPS: tl.constexpr, OFFSET: tl.constexpr, WEIGHT: tl.constexpr, ROUND: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows; SINGLE: COLUMNS covers the row and x is read once, else in two passes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (row < count)[:, None]
    x_row = X + row_start(row, x_inner, x_outer, x_step)[:, None]
    y_row = Y + (row.to(tl.int64) * width)[:, None]
    column = tl.arange(0, COLUMNS)
    x = tl.load(x_row + column[None, :], mask=live & (column < width)[None, :], other=0.0).to(ACC)
    square = tl.sum(x * x, 1)
    if not SINGLE:
        for start in range(COLUMNS, width, COLUMNS):
            c = start + column
            x = tl.load(x_row + c[None, :], mask=live & (c < width)[None, :], other=0.0).to(ACC)
            square += tl.sum(x * x, 1)
    rstd = tl.rsqrt(square / width + EPS)
    tl.store(RSTD + row, rstd, mask=row < count)
    for start in range(0, COLUMNS if SINGLE else width, COLUMNS):
        c = start + column
        if not SINGLE:
            x = tl.load(x_row + c[None, :], mask=live & (c < width)[None, :], other=0.0).to(ACC)
        n = x * rstd[:, None]
        if ROUND:
            n = n.to(X.dtype.element_ty).to(ACC)
        if WEIGHT:
            n = n * _load_weight(W, c, width, OFFSET, ACC)[None, :]
        tl.store(y_row + c[None, :], n, mask=live & (c < width)[None, :])


@jit
def _backward_kernel(
    DY, X, W, RSTD, DX, PARTIAL, count, width, y_inner, y_outer, y_step, x_inner, x_outer, x_step,
    OFFSET: tl.constexpr, WEIGHT: tl.constexpr, ROUND: tl.constexpr, NEED_DX: tl.constexpr, NEED_DW: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs stride over tiles of whole rows; each leaves its share of dw in one row of PARTIAL [programs, width]."""
    column = tl.arange(0, COLUMNS)
    inside = (column < width)[None, :]
    if WEIGHT:
        w = _load_weight(W, column, width, OFFSET, ACC)[None, :]
    if NEED_DW:
        total = tl.zeros([ROWS, COLUMNS], ACC)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & inside
        x_at = X + row_start(row, x_inner, x_outer, x_step)[:, None] + column[None, :]
        y_at = DY + row_start(row, y_inner, y_outer, y_step)[:, None] + column[None, :]
        x = tl.load(x_at, mask=mask, other=0.0).to(ACC)
        g = tl.load(y_at, mask=mask, other=0.0).to(ACC)
        rstd = tl.load(RSTD + row, mask=row < count, other=0.0)[:, None]
        n = x * rstd
        if NEED_DW:
            if ROUND:
                total += g * n.to(X.dtype.element_ty).to(ACC)
            else:
                total += g * n
        if NEED_DX:
            if WEIGHT:
                g = g * w
            dx = rstd * (g - n * (tl.sum(g * n, 1) / width)[:, None])
            tl.store(DX + (row.to(tl.int64) * width)[:, None] + column[None, :], dx, mask=mask)
    if NEED_DW:
        tl.store(PARTIAL + tl.program_id(0) * width + column, tl.sum(total, 0), mask=column < width)


@jit
def _backward_wide_kernel(
    DY, X, W, RSTD, DX, count, width, y_inner, y_outer, y_step, x_inner, x_outer, x_step,
    OFFSET: tl.constexpr, WEIGHT: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx of one row that is wider than a tile, in two passes."""
    row = tl.program_id(0)
    x_row = X + row_start(row, x_inner, x_outer, x_step)
    y_row = DY + row_start(row, y_inner, y_outer, y_step)
    rstd = tl.load(RSTD + row)
    column = tl.arange(0, COLUMNS)
    product = tl.zeros([COLUMNS], ACC)
    for start in range(0, width, COLUMNS):
        c = start + column
        g = tl.load(y_row + c, mask=c < width, other=0.0).to(ACC)
        if WEIGHT:
            g = g * _load_weight(W, c, width, OFFSET, ACC)
        product += g * tl.load(x_row + c, mask=c < width, other=0.0).to(ACC)
    mean = tl.sum(product, 0) * rstd / width
    for start in range(0, width, COLUMNS):
        c = start + column
        g = tl.load(y_row + c, mask=c < width, other=0.0).to(ACC)
        if WEIGHT:
            g = g * _load_weight(W, c, width, OFFSET, ACC)
        n = tl.load(x_row + c, mask=c < width, other=0.0).to(ACC) * rstd
        tl.store(DX + row.to(tl.int64) * width + c, rstd * (g - n * mean), mask=c < width)


@jit
def _weight_wide_kernel(
    DY, X, RSTD, PARTIAL, count, width, y_inner, y_outer, y_step, x_inner, x_outer, x_step,
    ROUND: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dw of COLUMNS columns (program axis 1) over every num_programs(0)-th row."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], ACC)
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        x = tl.load(X + row_start(row, x_inner, x_outer, x_step) + column, mask=column < width, other=0.0).to(ACC)
        g = tl.load(DY + row_start(row, y_inner, y_outer, y_step) + column, mask=column < width, other=0.0).to(ACC)
        n = x * tl.load(RSTD + row)
        if ROUND:
            n = n.to(X.dtype.element_ty).to(ACC)
        total += g * n
    tl.store(PARTIAL + tl.program_id(0) * width + column, total, mask=column < width)


def _forward_triton(x, weight, eps, offset, round_before_weight, out_dtype):
    order, width, compute = memory_order(x), x.shape[-1], compute_dtype(x, weight)
    y, rstd = _forward_fake(x, weight, eps, offset, round_before_weight, out_dtype)
    if x.numel() == 0:
        return y, rstd.zero_()
    y, rstd = Output(y, order), Output(rstd, order[:-1])
    x, *layout = rows(x, order)
    weight = weight if weight is None else weight.contiguous()
    count = x.numel() // width
    ROWS, COLUMNS, warps = tile(width)
    with on_device(x):
        _forward_kernel[(ceil_div(count, ROWS),)](
            x, weight, y.rows, rstd.rows, count, width, *layout,
            EPS=eps, OFFSET=offset, WEIGHT=weight is not None, ROUND=round_before_weight, ACC=triton_dtype(compute),
            ROWS=ROWS, COLUMNS=COLUMNS, SINGLE=width <= COLUMNS, num_warps=warps,
        )  # fmt: skip
    return y.finish(), rstd.finish()


def _backward_triton(dy, x, weight, rstd, offset, round_before_weight, need_dx, need_dw):
    order, width, compute = memory_order(x), x.shape[-1], compute_dtype(x, weight)
    dx, dw = _backward_fake(dy, x, weight, rstd, offset, round_before_weight, need_dx, need_dw)
    if x.numel() == 0:
        return dx, dw.zero_()
    dx = Output(dx, order if need_dx else [0])
    rstd = rstd.permute(order[:-1]).contiguous()
    dy, *dy_layout = rows(dy, order)
    x, *x_layout = rows(x, order)
    weight = weight if weight is None else weight.contiguous()
    count = x.numel() // width
    ROWS, COLUMNS, warps = tile(width, max_width=8192)
    programs = ceil_div(count, ROWS)
    if need_dw:
        programs = min(programs, processors(x) * max(2, 16 // warps))
        partial = x.new_empty(programs, width, dtype=compute)
    flags = dict(ACC=triton_dtype(compute), COLUMNS=COLUMNS, num_warps=warps)
    scaled = dict(OFFSET=offset, WEIGHT=weight is not None)
    sizes = (count, width, *dy_layout, *x_layout)
    with on_device(x):
        if width <= COLUMNS:
            _backward_kernel[(programs,)](
                dy, x, weight, rstd, dx.rows, partial if need_dw else None, *sizes,
                ROUND=round_before_weight, NEED_DX=need_dx, NEED_DW=need_dw, ROWS=ROWS, **scaled, **flags,
            )  # fmt: skip
        else:
            if need_dx:
                _backward_wide_kernel[(count,)](dy, x, weight, rstd, dx.rows, *sizes, **scaled, **flags)
            if need_dw:
                grid = (programs, ceil_div(width, COLUMNS))
                _weight_wide_kernel[grid](dy, x, rstd, partial, *sizes, ROUND=round_before_weight, **flags)
    return dx.finish(), partial.sum(0).to(weight.dtype) if need_dw else dw


_forward_op = register(
    "rms_norm_forward(Tensor x, Tensor? weight, float eps, float offset, bool round_before_weight, "
    "ScalarType out_dtype) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, bool round_before_weight, "
    "bool need_dx, bool need_dw) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
