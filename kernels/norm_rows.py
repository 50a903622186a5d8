"""What rms_norm and layer_norm do alike to a row: n = scale * u rounded, the weight, and an epsilon beside the root.

And the sums over rows that are the gradients of weight and bias: each program leaves its share and one kernel adds them
up, so that no order of summation depends on timing.
"""

from .common import INTERPRET, ceil_div, jit, launch, tl


def finished(u, dtype, scale, round_before_weight):
    """n = scale * u, u the row times rstd, rounded to the dtype given if the model rounds it before the weight."""
    n = u if scale == 1.0 else u * scale
    return n.to(dtype).to(u.dtype) if round_before_weight else n


@jit
def finish(u, S, SCALE: tl.constexpr, ROUND: tl.constexpr, ACC: tl.constexpr):
    """`finished` in Triton; the dtype is that of S."""
    if SCALE != 1.0:
        u = u * SCALE
    if ROUND:
        u = u.to(S.dtype.element_ty).to(ACC)
    return u


@jit
def load_weight(W, column, width, OFFSET: tl.constexpr, ACC: tl.constexpr):
    return OFFSET + tl.load(W + column, mask=column < width, other=0.0).to(ACC)


@jit
def weighted(g, W, column, width, OFFSET: tl.constexpr, SCALE: tl.constexpr, WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """scale * g * (offset + weight) of one row."""
    if WEIGHT:
        g = g * load_weight(W, column, width, OFFSET, ACC)
    if SCALE != 1.0:
        g = g * SCALE
    return g


@jit
def root_share(rstd, OUTSIDE: tl.constexpr):
    """1 - outside * rstd, the root's part of 1 / rstd; 1 where rounding leaves none of it: u is as small there."""
    share = 1 - OUTSIDE * rstd
    return tl.where(share > 0, share, 1.0)


@jit
def _sum_kernel(
    SHARES_W, SHARES_B, DW, DB, programs, width, NEED_DW: tl.constexpr, NEED_DB: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of COLUMNS columns (program axis 0) of SHARES [programs, width], of W and of B in turn (axis 1)."""
    if NEED_DW:
        if tl.program_id(1) == 0:
            _sum_columns(SHARES_W, DW, programs, width, ROWS, COLUMNS)
    if NEED_DB:
        if tl.program_id(1) == tl.num_programs(1) - 1:
            _sum_columns(SHARES_B, DB, programs, width, ROWS, COLUMNS)


@jit
def _sum_columns(SHARES, OUT, programs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < width)[None, :]
    total = tl.zeros([ROWS, COLUMNS], SHARES.dtype.element_ty)
    for first in range(0, programs, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        total += tl.load(SHARES + row * width + column[None, :], mask=(row < programs) & inside, other=0.0)
    tl.store(OUT + column, tl.sum(total, 0), mask=column < width)


def sum_shares(shares_w, shares_b, dw, db):
    """Write the sums of [programs, width] over the programs to dw and db, [width]; shares of None: not wanted."""
    shares = [t for t in (shares_w, shares_b) if t is not None]
    if shares:
        programs, width = shares[0].shape
        ROWS, COLUMNS = (8, 2048) if INTERPRET else (256, 16)  # a program costs the interpreter more than a number
        launch(_sum_kernel, ceil_div(width, COLUMNS), len(shares))(
            shares_w, shares_b, dw, db, programs, width, NEED_DW=shares_w is not None, NEED_DB=shares_b is not None,
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8,
        )  # fmt: skip
