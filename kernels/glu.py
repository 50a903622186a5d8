"""Gated linear unit: act(gate) * up, for two tensors or for one that packs both, as halves or in turns.

    y = act(g) * (u + shift)        dg = dy * (u + shift) * act'(g)        du = dy * act(g)

With a limit, g stands for min(g, limit), u for clamp(u, -limit, limit), and a number beyond its bound gets gradient 0.
Saves only its inputs; backward recomputes the activation.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from .activations import ACTIVATIONS, CUT, derivative, reference, value
from .common import (
    MADE_AGAIN,
    MadeAgain,
    Output,
    ceil_div,
    compute_dtype,
    jit,
    launch,
    memory_order,
    no_autocast,
    on_device,
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
def glu(gate, up, *, activation, alpha=1.0, limit=None, shift=0.0):
    """act(gate) * (up + shift) in float32 (float64 for float64 inputs), one rounding.

    gate, up: [..., F], same shape, any strides (a view of a packed projection is read in place).
    activation: a name in ACTIVATIONS. alpha: of silu alone, x * sigmoid(alpha * x); 1.702 is the quick GELU.
    limit: None, or a number >= 0 to which gate is cut off from above and up from both sides, before the shift.
    A gradient passes a cut as it does in torch.clamp: at the limit yes, beyond it and for NaN no.
    Returns [..., F], dtype promote(gate, up), in the layout of `gate`.
    """
    options = _options(activation, alpha, limit, shift)
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must have the same shape, not {list(gate.shape)} and {list(up.shape)}")
    return _GLU.apply(gate, up, options)


@traceable
def glu_packed(x, *, activation, gate_first=True, interleaved=False, alpha=1.0, limit=None, shift=0.0):
    """`glu` of a gate and an up that are packed along the last dimension of x; one gradient for x.

    x: [..., 2F], any strides: [gate, up], or with interleaved [gate_0, up_0, gate_1, up_1, ...]; gate_first=False: up
    comes first in either. activation, alpha, limit, shift: as in `glu`. Returns [..., F] in x.dtype.
    """
    options = _options(activation, alpha, limit, shift)
    if x.shape[-1] % 2:
        raise ValueError(f"the last dimension must be even, not {x.shape[-1]}")
    return _GLUPacked.apply(x, (gate_first, interleaved), options)


def _options(activation, alpha, limit, shift):
    """The options in the order in which all below take them."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if alpha != 1 and activation != "silu":
        raise ValueError(f"alpha is an option of silu, not of {activation}")
    if limit is not None and not limit >= 0:
        raise ValueError(f"limit must be None or a number >= 0, not {limit}")
    limit = None if limit is None or math.isinf(limit) else float(limit)
    return activation, float(alpha), limit, float(shift)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, options):
        ctx.save_for_backward(gate, up)
        ctx.options = options
        return _forward_op(gate, up, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        need_gate, need_up = ctx.needs_input_grad[:2]
        dgate, dup = _backward_op(dy, *ctx.saved_tensors, *ctx.options, need_gate, need_up)
        return dgate if need_gate else None, dup if need_up else None, None


class _GLUPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packing, options):
        ctx.save_for_backward(x)
        ctx.packing, ctx.options = packing, options
        return _packed_forward_op(x, *packing, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _packed_backward_op(dy, *ctx.saved_tensors, *ctx.packing, *ctx.options), None, None


def _unpack(x, gate_first, interleaved):
    """(gate, up) views of a packed tensor."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


def _forward(gate, up, *options):
    if use_triton(gate):
        return _forward_triton(gate, up, *options)
    return _forward_reference(gate, up, *options)


def _forward_fake(gate, up, *options):
    return torch.empty_like(gate, dtype=torch.promote_types(gate.dtype, up.dtype))


def _forward_reference(gate, up, activation, alpha, limit, shift):
    with no_autocast(gate):
        compute = compute_dtype(gate, up)
        g, u = gate.to(compute), up.to(compute)
        if limit is not None:
            g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        y = reference(g, activation, alpha)[0] * (u + shift)
        return _forward_fake(gate, up).copy_(y)


def _backward(dy, gate, up, activation, alpha, limit, shift, need_gate, need_up):
    options = (activation, alpha, limit, shift)
    dgate, dup = _backward_fake(dy, gate, up, *options, need_gate, need_up)
    if use_triton(gate):
        order = memory_order(gate)
        outputs = [Output(t, order) if need else None for t, need in ((dgate, need_gate), (dup, need_up))]
        _backward_triton(dy, gate, up, *options, order, *(o and o.rows for o in outputs))
        for out in outputs:
            out and out.finish()
        return dgate, dup
    _backward_reference(dy, gate, up, *options, dgate if need_gate else None, dup if need_up else None)
    return dgate, dup


def _backward_fake(dy, gate, up, activation, alpha, limit, shift, need_gate, need_up):
    dgate = torch.empty_like(gate) if need_gate else gate.new_empty(0)
    return dgate, torch.empty_like(up) if need_up else gate.new_empty(0)


def _backward_reference(dy, gate, up, activation, alpha, limit, shift, dgate, dup):
    with no_autocast(gate):
        compute = compute_dtype(gate, up)
        dy, g, u = dy.to(compute), gate.to(compute), up.to(compute)
        g_in, u_in = (True, True) if limit is None else (g <= limit, u.abs() <= limit)
        if limit is not None:
            g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        act, slope = reference(g, activation, alpha)
        if dgate is not None:
            dg = dy * (u + shift) * slope
            if activation in CUT:
                dg = dg.masked_fill(g <= 0, 0)
            dgate.copy_(dg if limit is None else torch.where(g_in, dg, 0))
        if dup is not None:
            du = dy * act
            dup.copy_(du if limit is None else torch.where(u_in, du, 0))


def _packed_forward(x, gate_first, interleaved, *options):
    gate, up = _unpack(x, gate_first, interleaved)
    if not use_triton(x):
        return _forward_reference(gate, up, *options)
    return _forward_triton(gate, up, *options, packed=(x, gate_first) if interleaved else None)


def _packed_forward_fake(x, gate_first, interleaved, *options):
    return _forward_fake(*_unpack(x, gate_first, interleaved))


def _packed_backward(dy, x, gate_first, interleaved, *options):
    gate, up = _unpack(x, gate_first, interleaved)
    dx = torch.empty_like(x)
    if not use_triton(x):
        _backward_reference(dy, gate, up, *options, *_unpack(dx, gate_first, interleaved))
        return dx
    order = memory_order(x)
    dx = Output(dx, order)
    if interleaved:
        _interleaved_backward_triton(dy, x, gate_first, *options, order, dx.rows)
    else:
        _backward_triton(dy, gate, up, *options, order, dx.rows, None, packed=True, gate_first=gate_first)
    return dx.finish()


def _packed_backward_fake(dy, x, gate_first, interleaved, *options):
    return torch.empty_like(x)


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


MADE_AGAIN[_forward_kernel] = MadeAgain(_backward_kernel, "Y", ("G", "U"))


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


def _forward_triton(gate, up, *options, packed=None):
    """packed: (x, gate_first), where gate and up take turns in x."""
    order, width = memory_order(gate), gate.shape[-1]
    y = _forward_fake(gate, up)
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


def _backward_triton(
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


def _interleaved_backward_triton(dy, x, gate_first, activation, alpha, limit, shift, order, dx):
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


_OPTIONS = "str activation, float alpha, float? limit, float shift"
_PACKING = "bool gate_first, bool interleaved"
_forward_op = register(
    f"glu_forward(Tensor gate, Tensor up, {_OPTIONS}) -> Tensor", _forward, _forward_fake, traced=True
)
_backward_op = register(
    f"glu_backward(Tensor dy, Tensor gate, Tensor up, {_OPTIONS}, bool need_gate, bool need_up) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    traced=True,
)
_packed_forward_op = register(
    f"glu_packed_forward(Tensor x, {_PACKING}, {_OPTIONS}) -> Tensor",
    _packed_forward,
    _packed_forward_fake,
    traced=True,
)
_packed_backward_op = register(
    f"glu_packed_backward(Tensor dy, Tensor x, {_PACKING}, {_OPTIONS}) -> Tensor",
    _packed_backward,
    _packed_backward_fake,
    traced=True,
)
