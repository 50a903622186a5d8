"""GLU's Triton kernels and their launches; glu.py has the formula, the reference and the operators."""

from .activations import derivative, value
from .common import (
    MADE_AGAIN,
    MadeAgain,
    Output,
    ceil_div,
    compute_dtype,
    jit,
    launch,
    memory_order,
    on_device,
    row_start,
    rows,
    tile,
    tl,
    triton_dtype,
)


@jit
def _value(g, u, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    if LIMIT is not None:
        g = tl.where(g > LIMIT, LIMIT, g)
    return value(g, ACTIVATION, ALPHA) * _factor(u, LIMIT, SHIFT)


@jit
def _factor(u, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """clamp(u) + shift: what the activation is multiplied by."""
    if LIMIT is not None:
        u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
    return u if SHIFT == 0.0 else u + SHIFT


@jit
def _gate_gradient(
    dy, g, u, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    dg = dy * _factor(u, LIMIT, SHIFT) * derivative(g, ACTIVATION, ALPHA)
    if ACTIVATION == "relu" or ACTIVATION == "relu2":  # CUT
        dg = tl.where(g <= 0, 0.0, dg)
    return dg if LIMIT is None else tl.where(g <= LIMIT, dg, 0.0)


@jit
def _up_gradient(dy, g, u, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """u is not looked at without a limit."""
    if LIMIT is None:
        return dy * value(g, ACTIVATION, ALPHA)
    else:
        return tl.where(tl.abs(u) <= LIMIT, dy * value(tl.where(g > LIMIT, LIMIT, g), ACTIVATION, ALPHA), 0.0)


@jit
def _place(width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(first row, first column) of a program's tile: programs go along the rows, as memory does."""
    across = tl.cdiv(width, COLUMNS)
    return tl.program_id(0) // across * ROWS, tl.program_id(0) % across * COLUMNS


@jit
def _forward_kernel(
    G, U, Y, count, width, g_inner, g_outer, g_step, u_inner, u_outer, u_step,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows by COLUMNS columns; Y is dense."""
    first_row, first = _place(width, ROWS, COLUMNS)
    row = first_row + tl.arange(0, ROWS)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    mask = (row < count)[:, None] & (column < width)
    g = tl.load(G + row_start(row, g_inner, g_outer, g_step)[:, None] + column, mask=mask, other=0.0).to(ACC)
    u = tl.load(U + row_start(row, u_inner, u_outer, u_step)[:, None] + column, mask=mask, other=0.0).to(ACC)
    y = _value(g, u, ACTIVATION, ALPHA, LIMIT, SHIFT)
    tl.store(Y + (row.to(tl.int64) * width)[:, None] + column, y, mask=mask)


@jit
def _backward_kernel(
    DY, G, U, DG, DU, Y, count, width, y_inner, y_outer, y_step, g_inner, g_outer, g_step, u_inner, u_outer, u_step,
    PACKED: tl.constexpr, GATE_FIRST: tl.constexpr, NEED_GATE: tl.constexpr, NEED_UP: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tiles as in forward; DG and DU are dense, or PACKED: DG holds both, a row of one beside that of the other.

    Y: None, or forward's result is written there, too.
    """
    first_row, first = _place(width, ROWS, COLUMNS)
    row = first_row + tl.arange(0, ROWS)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    mask = (row < count)[:, None] & (column < width)
    out = (row.to(tl.int64) * (width * (2 if PACKED else 1)))[:, None] + column
    dy = tl.load(DY + row_start(row, y_inner, y_outer, y_step)[:, None] + column, mask=mask, other=0.0).to(ACC)
    g = tl.load(G + row_start(row, g_inner, g_outer, g_step)[:, None] + column, mask=mask, other=0.0).to(ACC)
    u = g
    if NEED_GATE or LIMIT is not None or Y is not None:
        u = tl.load(U + row_start(row, u_inner, u_outer, u_step)[:, None] + column, mask=mask, other=0.0).to(ACC)
    if PACKED:
        DU = DG
        if GATE_FIRST:
            DU += width
        else:
            DG += width
    if NEED_GATE:
        tl.store(DG + out, _gate_gradient(dy, g, u, ACTIVATION, ALPHA, LIMIT, SHIFT), mask=mask)
    if NEED_UP:
        tl.store(DU + out, _up_gradient(dy, g, u, ACTIVATION, ALPHA, LIMIT), mask=mask)
    if Y is not None:
        y = _value(g, u, ACTIVATION, ALPHA, LIMIT, SHIFT)
        tl.store(Y + (row.to(tl.int64) * width)[:, None] + column, y, mask=mask)


MADE_AGAIN[_forward_kernel] = MadeAgain("glu", _backward_kernel, "Y", ("G", "U"))


@jit
def _load_pairs(X, column, mask, width, GATE_FIRST: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr):  # fmt: skip
    """(g, u), [ROWS, COLUMNS] each, of a tile [ROWS, 2 * COLUMNS] in which they take turns: one contiguous load."""
    x = tl.load(X + column, mask=mask & (column < width), other=0.0).to(ACC)
    first, second = tl.split(tl.reshape(x, [ROWS, COLUMNS, 2]))
    return (first, second) if GATE_FIRST else (second, first)


@jit
def _interleaved_forward_kernel(
    X, Y, count, width, x_inner, x_outer, x_step,
    GATE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tiles as above; width: of y, of which each number is made of two neighbours in x."""
    first_row, first = _place(width, ROWS, COLUMNS)
    row = first_row + tl.arange(0, ROWS)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    column_x = (2 * first + tl.arange(0, 2 * COLUMNS))[None, :]
    mask = (row < count)[:, None]
    g, u = _load_pairs(
        X + row_start(row, x_inner, x_outer, x_step)[:, None], column_x, mask, 2 * width, GATE_FIRST, ACC, ROWS, COLUMNS
    )
    y = _value(g, u, ACTIVATION, ALPHA, LIMIT, SHIFT)
    tl.store(Y + (row.to(tl.int64) * width)[:, None] + column, y, mask=mask & (column < width))


@jit
def _interleaved_backward_kernel(
    DY, X, DX, count, width, y_inner, y_outer, y_step, x_inner, x_outer, x_step,
    GATE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tiles as in forward; DX is dense."""
    first_row, first = _place(width, ROWS, COLUMNS)
    row = first_row + tl.arange(0, ROWS)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    column_x = (2 * first + tl.arange(0, 2 * COLUMNS))[None, :]
    mask = (row < count)[:, None]
    at = row_start(row, y_inner, y_outer, y_step)[:, None] + column
    dy = tl.load(DY + at, mask=mask & (column < width), other=0.0).to(ACC)
    g, u = _load_pairs(
        X + row_start(row, x_inner, x_outer, x_step)[:, None], column_x, mask, 2 * width, GATE_FIRST, ACC, ROWS, COLUMNS
    )
    dg = _gate_gradient(dy, g, u, ACTIVATION, ALPHA, LIMIT, SHIFT)
    du = _up_gradient(dy, g, u, ACTIVATION, ALPHA, LIMIT)
    dx = tl.interleave(dg, du) if GATE_FIRST else tl.interleave(du, dg)
    tl.store(DX + (row.to(tl.int64) * 2 * width)[:, None] + column_x, dx, mask=mask & (column_x < 2 * width))


def _grid(count, width):
    ROWS, COLUMNS, warps = tile(width, elements=1024, max_width=1024)
    return ceil_div(count, ROWS) * ceil_div(width, COLUMNS), dict(ROWS=ROWS, COLUMNS=COLUMNS, num_warps=warps)


def _constants(activation, alpha, limit, shift, *tensors):
    return dict(
        ACTIVATION=activation, ALPHA=alpha, LIMIT=limit, SHIFT=shift, ACC=triton_dtype(compute_dtype(*tensors))
    )  # fmt: skip


def forward(gate, up, y, *options, packed=None):
    """Write y and return it. packed: (x, gate_first), where gate and up take turns in x."""
    order, width = memory_order(gate), gate.shape[-1]
    if gate.numel() == 0:
        return y
    y = Output(y, order)
    count = gate.numel() // width
    grid, sizes = _grid(count, width)
    constants = _constants(*options, gate, up) | sizes
    with on_device(gate):
        if packed:
            x, *x_layout = rows(packed[0], order)
            launch(_interleaved_forward_kernel, grid)(
                x, y.rows, count, width, *x_layout, GATE_FIRST=packed[1], **constants
            )
        else:
            (gate, *g_layout), (up, *u_layout) = rows(gate, order), rows(up, order)
            launch(_forward_kernel, grid)(gate, up, y.rows, count, width, *g_layout, *u_layout, **constants)
    return y.finish()


def backward(
    dy, gate, up, activation, alpha, limit, shift, order, dgate, dup, *, packed=False, gate_first=True
):  # fmt: skip
    """Write dgate and dup (dense rows in `order`; None: not wanted), or packed, both into dgate."""
    width = gate.shape[-1]
    if gate.numel() == 0:
        return
    constants = _constants(activation, alpha, limit, shift, gate, up)
    (dy, *y_layout), (gate, *g_layout), (up, *u_layout) = rows(dy, order), rows(gate, order), rows(up, order)
    grid, sizes = _grid(gate.numel() // width, width)
    with on_device(gate):
        launch(_backward_kernel, grid)(
            dy, gate, up, dgate, dup, None, gate.numel() // width, width, *y_layout, *g_layout, *u_layout,
            PACKED=packed, GATE_FIRST=gate_first, NEED_GATE=dgate is not None, NEED_UP=packed or dup is not None,
            **constants, **sizes,
        )  # fmt: skip


def interleaved_backward(dy, x, gate_first, activation, alpha, limit, shift, order, dx):
    """Write dx (dense rows in `order`)."""
    if x.numel() == 0:
        return
    constants = _constants(activation, alpha, limit, shift, x)
    (dy, *y_layout), (x, *x_layout) = rows(dy, order), rows(x, order)
    width = dy.shape[-1]
    grid, sizes = _grid(dy.numel() // width, width)
    with on_device(x):
        launch(_interleaved_backward_kernel, grid)(
            dy, x, dx, dy.numel() // width, width, *y_layout, *x_layout, GATE_FIRST=gate_first, **constants, **sizes
        )
