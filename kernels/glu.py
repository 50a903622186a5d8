"""Gated linear unit: act(gate) * up, for two tensors or for one that packs both halves.

    y = act(g) * u        dg = dy * u * act'(g)        du = dy * act(g)

Saves only its inputs; backward recomputes the activation.
"""

import torch
from torch.autograd.function import once_differentiable

from .activations import ACTIVATIONS, derivative, value
from .common import (
    Output,
    ceil_div,
    compute_dtype,
    jit,
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
def glu(gate, up, *, activation):
    """act(gate) * up in float32 (float64 for float64 inputs), one rounding; activation: a name in ACTIVATIONS.

    gate, up: [..., F], same shape, any strides (a view of a packed projection is read in place).
    Returns [..., F], dtype promote(gate, up), in the layout of `gate`.
    """
    _check(activation)
    if gate.shape != up.shape:
        raise ValueError(f"gate and up must have the same shape, not {list(gate.shape)} and {list(up.shape)}")
    return _GLU.apply(gate, up, activation)


@traceable
def glu_packed(x, *, activation, gate_first=True):
    """act(gate) * up with x = [gate, up] (or [up, gate]) packed along the last dimension; one gradient for x.

    x: [..., 2F], any strides. Returns [..., F] in x.dtype.
    """
    _check(activation)
    if x.shape[-1] % 2:
        raise ValueError(f"the last dimension must be even, not {x.shape[-1]}")
    return _GLUPacked.apply(x, activation, gate_first)


def _check(activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _forward_op(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        need_gate, need_up = ctx.needs_input_grad[:2]
        dgate, dup = _backward_op(dy, *ctx.saved_tensors, ctx.activation, need_gate, need_up)
        return dgate if need_gate else None, dup if need_up else None, None


class _GLUPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, gate_first):
        ctx.save_for_backward(x)
        ctx.activation, ctx.gate_first = activation, gate_first
        return _packed_forward_op(x, activation, gate_first)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _packed_backward_op(dy, *ctx.saved_tensors, ctx.activation, ctx.gate_first), None, None


def _halves(x, gate_first):
    """(gate, up) views of a packed tensor."""
    first, second = x.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


def _forward(gate, up, activation):
    if use_triton(gate):
        return _forward_triton(gate, up, activation)
    with no_autocast(gate):
        compute = compute_dtype(gate, up)
        y = ACTIVATIONS[activation](gate.to(compute))[0] * up.to(compute)
        return _forward_fake(gate, up, activation).copy_(y)


def _forward_fake(gate, up, activation):
    return torch.empty_like(gate, dtype=torch.promote_types(gate.dtype, up.dtype))


def _backward(dy, gate, up, activation, need_gate, need_up):
    dgate, dup = _backward_fake(dy, gate, up, activation, need_gate, need_up)
    if use_triton(gate):
        order = memory_order(gate)
        outputs = [Output(t, order) if need else None for t, need in ((dgate, need_gate), (dup, need_up))]
        _backward_triton(dy, gate, up, activation, order, gate.shape[-1], *(o and o.rows for o in outputs))
        for out in outputs:
            out and out.finish()
        return dgate, dup
    _backward_reference(dy, gate, up, activation, dgate if need_gate else None, dup if need_up else None)
    return dgate, dup


def _backward_fake(dy, gate, up, activation, need_gate, need_up):
    dgate = torch.empty_like(gate) if need_gate else gate.new_empty(0)
    return dgate, torch.empty_like(up) if need_up else gate.new_empty(0)


def _backward_reference(dy, gate, up, activation, dgate, dup):
    with no_autocast(gate):
        compute = compute_dtype(gate, up)
        act, slope = ACTIVATIONS[activation](gate.to(compute))
        if dgate is not None:
            dgate.copy_(dy.to(compute) * up.to(compute) * slope)
        if dup is not None:
            dup.copy_(dy.to(compute) * act)


def _packed_forward(x, activation, gate_first):
    return _forward(*_halves(x, gate_first), activation)


def _packed_forward_fake(x, activation, gate_first):
    return _forward_fake(*_halves(x, gate_first), activation)


def _packed_backward(dy, x, activation, gate_first):
    gate, up = _halves(x, gate_first)
    dx = torch.empty_like(x)
    if not use_triton(x):
        _backward_reference(dy, gate, up, activation, *_halves(dx, gate_first))
        return dx
    order = memory_order(x)
    dx = Output(dx, order)
    _backward_triton(dy, gate, up, activation, order, x.shape[-1], *_halves(dx.rows, gate_first))
    return dx.finish()


def _packed_backward_fake(dy, x, activation, gate_first):
    return torch.empty_like(x)


@jit
def _forward_kernel(
    G, U, Y, count, width, g_inner, g_outer, g_step, u_inner, u_outer, u_step,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tile: ROWS rows (program axis 0) by COLUMNS columns (axis 1); Y is dense."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < count)[:, None] & (column < width)
    g = tl.load(G + row_start(row, g_inner, g_outer, g_step)[:, None] + column, mask=mask, other=0.0).to(ACC)
    u = tl.load(U + row_start(row, u_inner, u_outer, u_step)[:, None] + column, mask=mask, other=0.0).to(ACC)
    tl.store(Y + (row.to(tl.int64) * width)[:, None] + column, value(g, ACTIVATION) * u, mask=mask)


@jit
def _backward_kernel(
    DY, G, U, DG, DU, count, width, y_inner, y_outer, y_step, g_inner, g_outer, g_step, u_inner, u_outer, u_step,
    d_step, NEED_GATE: tl.constexpr, NEED_UP: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Tiles as in forward; rows of DG and DU are d_step apart (2 * width where both lie in one packed gradient)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < count)[:, None] & (column < width)
    out = (row.to(tl.int64) * d_step)[:, None] + column
    dy = tl.load(DY + row_start(row, y_inner, y_outer, y_step)[:, None] + column, mask=mask, other=0.0).to(ACC)
    g = tl.load(G + row_start(row, g_inner, g_outer, g_step)[:, None] + column, mask=mask, other=0.0).to(ACC)
    if NEED_GATE:
        u = tl.load(U + row_start(row, u_inner, u_outer, u_step)[:, None] + column, mask=mask, other=0.0).to(ACC)
        tl.store(DG + out, dy * u * derivative(g, ACTIVATION), mask=mask)
    if NEED_UP:
        tl.store(DU + out, dy * value(g, ACTIVATION), mask=mask)


def _grid(count, width):
    ROWS, COLUMNS, warps = tile(width, elements=1024, max_width=1024)
    return (ceil_div(count, ROWS), ceil_div(width, COLUMNS)), dict(ROWS=ROWS, COLUMNS=COLUMNS, num_warps=warps)


def _forward_triton(gate, up, activation):
    order, width = memory_order(gate), gate.shape[-1]
    y = _forward_fake(gate, up, activation)
    if gate.numel() == 0:
        return y
    y = Output(y, order)
    acc = triton_dtype(compute_dtype(gate, up))
    (gate, *g_layout), (up, *u_layout) = rows(gate, order), rows(up, order)
    grid, sizes = _grid(gate.numel() // width, width)
    with on_device(gate):
        _forward_kernel[grid](
            gate, up, y.rows, gate.numel() // width, width, *g_layout, *u_layout,
            ACTIVATION=activation, ACC=acc, **sizes,
        )  # fmt: skip
    return y.finish()


def _backward_triton(dy, gate, up, activation, order, d_step, dgate, dup):
    """Write dgate and dup (rows in `order`, d_step apart; None: not wanted)."""
    width = gate.shape[-1]
    if gate.numel() == 0:
        return
    acc = triton_dtype(compute_dtype(gate, up))
    (dy, *y_layout), (gate, *g_layout), (up, *u_layout) = rows(dy, order), rows(gate, order), rows(up, order)
    grid, sizes = _grid(gate.numel() // width, width)
    with on_device(gate):
        _backward_kernel[grid](
            dy, gate, up, dgate, dup, gate.numel() // width, width, *y_layout, *g_layout, *u_layout, d_step,
            NEED_GATE=dgate is not None, NEED_UP=dup is not None, ACTIVATION=activation, ACC=acc, **sizes,
        )  # fmt: skip


_forward_op = register("glu_forward(Tensor gate, Tensor up, str activation) -> Tensor", _forward, _forward_fake)
_backward_op = register(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str activation, bool need_gate, bool need_up) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_packed_forward_op = register(
    "glu_packed_forward(Tensor x, str activation, bool gate_first) -> Tensor", _packed_forward, _packed_forward_fake
)
_packed_backward_op = register(
    "glu_packed_backward(Tensor dy, Tensor x, str activation, bool gate_first) -> Tensor",
    _packed_backward,
    _packed_backward_fake,
)
