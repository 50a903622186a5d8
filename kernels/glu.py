"""Gated linear unit: act(gate) * up, for two tensors or for one that packs both, as halves or in turns.

    y = act(g) * (u + shift)        dg = dy * (u + shift) * act'(g)        du = dy * act(g)

With a limit, g stands for min(g, limit), u for clamp(u, -limit, limit), and a number beyond its bound gets gradient 0.
Saves only its inputs; backward recomputes the activation.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from .activations import ACTIVATIONS, CUT, reference
from .common import Output, compute_dtype, memory_order, no_autocast, register, traceable, use_triton
from .glu_triton import backward, forward, interleaved_backward


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
        return forward(gate, up, _forward_fake(gate, up), *options)
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
        backward(dy, gate, up, *options, order, *(o and o.rows for o in outputs))
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
    return forward(gate, up, _forward_fake(gate, up), *options, packed=(x, gate_first) if interleaved else None)


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
        interleaved_backward(dy, x, gate_first, *options, order, dx.rows)
    else:
        backward(dy, gate, up, *options, order, dx.rows, None, packed=True, gate_first=gate_first)
    return dx.finish()


def _packed_backward_fake(dy, x, gate_first, interleaved, *options):
    return torch.empty_like(x)


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
