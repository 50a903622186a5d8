"""Canonical form of pointwise operators: powers, quotients, signs, clamps and selections have one spelling each."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from rewriter.canonical.activations import activation
from rewriter.canonical.reductions import largest, without_maximum
from rewriter.canonical.table import aten, negative, operand, rule
from rewriter.canonical.z_loss import with_z_loss
from rewriter.meta import tensor_meta
from rewriter.shadow import Shadow, Value

_UNARY = {
    aten.rsqrt: "rsqrt",
    aten.sqrt: "sqrt",
    aten.exp: "exp",
    aten.log: "log",
    aten.tanh: "tanh",
    aten.sigmoid: "sigmoid",
    aten.silu: "silu",
    aten.relu: "relu",
    aten.relu6: "relu6",
    aten.mish: "mish",
    aten.hardswish: "hardswish",
    aten.erf: "erf",
    aten.abs: "abs",
    aten.square: "square",
    aten.log_sigmoid: "log_sigmoid",
    aten.real: "real",
    aten.imag: "imag",
    aten.cos: "cos",
    aten.sin: "sin",
    aten.softplus: "softplus",
}


@rule(*_UNARY)
def _unary(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    packet = node.target.overloadpacket
    if args[0].op == "complex" and packet in (aten.real, aten.imag):
        part = args[0].inputs[packet is aten.imag]
        return shadow.add(part.op, part.inputs, part.attrs, node)
    if packet is aten.log and args[0].op == "softmax":
        return shadow.add("log_softmax", args[0].inputs, args[0].attrs, node)
    if packet in (aten.rsqrt, aten.sqrt) and args[0].op == "reshape" and (inner := before_squeeze(args[0])) is not None:
        root = shadow.add(_UNARY[packet], (inner,), (), meta=inner.meta)
        return shadow.add("reshape", (root,), args[0].attrs, node)
    rest = tuple(a for a in args[1:] if a is not None)
    return shadow.add(_UNARY[packet], (args[0],), () if packet is not aten.softplus else rest, node)


@rule(aten.neg, aten.negative, operator.neg)
def _neg(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    return negated(shadow, args[0], node)


def negated(shadow: Shadow, value: Value, node: fx.Node | None) -> Value:
    if value.op == "neg":
        inner = value.inputs[0]
        if inner.node is None and node is not None:
            return shadow.add(inner.op, inner.inputs, inner.attrs, node)
        return inner
    if value.op == "sub":
        return minus(shadow, node, *value.inputs[::-1])
    return shadow.add("neg", (value,), (), node, value.meta)


@rule(aten.elu, aten.leaky_relu)
def _with_slope(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    return shadow.add(node.target.overloadpacket.__name__, (args[0],), tuple(args[1:]), node)


@rule(aten.glu)
def _glu(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, dim = args[:2]
    return None if value.meta is None else shadow.add("glu", (value,), (negative(dim, value.meta.ndim),), node)


@rule(aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum, aten.clip, aten.hardtanh)
def _clamp(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    packet, value = node.target.overloadpacket, args[0]
    low, high = args[1], args[2] if len(args) > 2 else None
    if packet in (aten.clamp_max, aten.minimum):
        low, high = None, low
    bounds = [None if b is None else operand(shadow, b) for b in (low, high)]
    if not isinstance(value, Value) or any(b is not None and b.op != "const" for b in bounds):
        return None
    low, high = bounds
    if low is not None and low.const == 0.0 and high is None:
        return shadow.add("relu", (value,), (), node)
    if low is not None and high is not None:
        value = shadow.add("clamp_min", (value, low), meta=value.meta)
        return shadow.add("clamp_max", (value, high), (), node)
    if low is not None:
        return shadow.add("clamp_min", (value, low), (), node)
    return shadow.add("clamp_max", (value, high), (), node) if high is not None else value


@rule(aten.max)
def _max(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    return (_clamp if node.target._overloadname == "other" else largest)(shadow, node, args)


@rule(aten.where, aten.masked_fill)
def _where(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    if node.target.overloadpacket is aten.masked_fill:
        args = [args[1], args[2], args[0]]
    if len(args) < 3:
        return None
    condition, *branches = (operand(shadow, a) for a in args[:3])
    if condition is None or condition.op == "const" or None in branches:
        return None
    if condition.op == "not":  # one form: the branch for a true condition first
        condition, branches = condition.inputs[0], branches[::-1]
    return shadow.add("where", (condition, *branches), (), node)


@rule(aten.logical_not, aten.bitwise_not)
def _not(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    meta = args[0].meta
    if meta is None or not str(meta.dtype).endswith("bool"):
        return None
    return args[0].inputs[0] if args[0].op == "not" else shadow.add("not", (args[0],), (), node)


@rule(torch.tensor)
def _tensor(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    number = node.args[0] if node.args else None
    return shadow.const(float(number)) if type(number) in (int, float) else None


@rule(aten.full, aten.scalar_tensor, aten.full_like, aten.new_full, aten.zeros, aten.ones)
def _number(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    """A tensor without dimensions made of a number is that number."""
    meta, packet = tensor_meta(node), node.target.overloadpacket
    if meta is None or meta.ndim:
        return None
    fixed = {
        aten.zeros: 0.0,
        aten.ones: 1.0,
        aten.scalar_tensor: args[0],
        aten.new_full: args[-5] if len(args) > 6 else None,
    }
    number = fixed.get(packet, args[1] if len(args) > 1 else None)
    return shadow.const(float(number)) if isinstance(number, int | float) else None


@rule(aten.gelu)
def _gelu(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    return shadow.add("gelu_tanh" if args[1] == "tanh" else "gelu", (args[0],), (), node)


@rule(aten.reciprocal)
def _reciprocal(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    return inverse(shadow, args[0], node)


def inverse(shadow: Shadow, value: Value, node: fx.Node | None) -> Value:
    """1 / value."""
    meta = value.meta
    if value.op == "reshape" and (squeezed := before_squeeze(value)) is not None:
        return shadow.add("reshape", (inverse(shadow, squeezed, None),), value.attrs, node, meta)
    if value.op == "sqrt":
        return shadow.add("rsqrt", value.inputs, (), node, meta)
    if value.op == "add":  # 1 / (1 + exp(-x)), the sigmoid written out
        for a, b in (value.inputs, value.inputs[::-1]):
            if b.op == "const" and b.const == 1.0 and a.op == "exp" and a.inputs[0].op == "neg":
                return shadow.add("sigmoid", a.inputs[0].inputs, (), node, meta)
    return shadow.add("reciprocal", (value,), (), node, meta)


@rule(aten.pow)
def _pow(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    base, exponent = (operand(shadow, a) for a in args[:2])
    if base is None or exponent is None:
        return None
    names = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt"}
    if exponent.op == "const" and exponent.const in names:
        return shadow.add(names[exponent.const], (base,), (), node)
    if exponent.op == "const" and exponent.const == -1.0:
        return inverse(shadow, base, node)
    return shadow.add("pow", (base, exponent), (), node)


@rule(aten.add, aten.sub, aten.subtract, aten.rsub, operator.add, operator.sub)
def _add(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    packet = getattr(node.target, "overloadpacket", node.target)
    left, right = (operand(shadow, a) for a in args[:2])
    if left is None or right is None or tensor_meta(node) is None:
        return None
    alpha = args[2] if len(args) > 2 else 1
    if alpha != 1:
        if packet is not aten.add or not isinstance(alpha, int | float):
            return None
        right = product(shadow, None, right, shadow.const(float(alpha)))
    if packet is aten.rsub:
        left, right = right, left
    if packet in (aten.add, operator.add):
        return plus(shadow, node, left, right)
    return minus(shadow, node, left, right)


@rule(aten.addcmul)
def _addcmul(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    added, left, right = (operand(shadow, a) for a in args[:3])
    value = node.kwargs.get("value", 1)
    if not isinstance(value, int | float) or tensor_meta(node) is None:
        return None
    term = product(shadow, None, left, right)
    return plus(shadow, node, added, term if value == 1 else product(shadow, None, term, shadow.const(float(value))))


def plus(shadow: Shadow, node: fx.Node | None, left: Value, right: Value) -> Value:
    if left.op == right.op == "neg":
        return negated(shadow, plus(shadow, None, left.inputs[0], right.inputs[0]), node)
    for a, b in ((left, right), (right, left)):
        if a.op == "reshape" and b.op == "const" and (squeezed := before_squeeze(a)) is not None:
            return shadow.add("reshape", (plus(shadow, None, squeezed, b),), a.attrs, node, a.meta)
        if a.op == "linear" and len(a.inputs) == 2 and b.op == "input" and _is_bias(a, b):
            return shadow.add("linear", (*a.inputs, b), (), node, a.meta)
        if b.op == "neg":
            return minus(shadow, node, a, b.inputs[0])
    if node is not None and (loss := with_z_loss(shadow, node, left, right)) is not None:
        return loss
    return shadow.add("add", (left, right), (), node, meta=_widest(left, right))


def before_squeeze(value: Value) -> Value | None:
    """Where a reshape only drops a last dimension of size 1: the tensor that still has it."""
    source = value.inputs[0]
    if source.meta is None or value.meta is None or source.meta.shape != (*value.meta.shape, 1):
        return None
    return source


def _is_bias(product: Value, added: Value) -> bool:
    given, wanted = added.meta, product.meta
    return given is not None and wanted is not None and given.ndim == 1 and given.shape == wanted.shape[-1:]


def minus(shadow: Shadow, node: fx.Node | None, left: Value, right: Value) -> Value:
    if right.op == "neg":
        return plus(shadow, node, left, right.inputs[0])
    if right.op == "const" and right.const not in (0.0, 1.0):
        return shadow.add("add", (left, shadow.const(-right.const)), (), node, meta=left.meta)
    if (known := log_probability(shadow, node, left, right)) is not None:
        return known
    return shadow.add("sub", (left, right), (), node, meta=_widest(left, right))


def log_probability(shadow: Shadow, node: fx.Node | None, left: Value, right: Value) -> Value | None:
    """What subtracts a logsumexp: `z - lse` is log_softmax, `z[target] - lse` one of its entries."""
    normaliser = right.inputs[0] if right.op == "reshape" else right
    if normaliser.op == "logsumexp" and normaliser.attrs[0] == (-1,):
        source, kept = normaliser.inputs[0], right.op == "reshape" or normaliser.attrs[1]
        if kept and left.number == source.number:
            return shadow.add("log_softmax", (source,), (-1,), node, left.meta)
        if left.op == "gather" and left.inputs[0].number == source.number and kept == (not left.attrs):
            return shadow.add("log_probability", left.inputs, left.attrs, node, left.meta)
        picked = left.inputs[0] if left.op == "reshape" else left
        if picked.op == "gather" and picked.inputs[0].number == source.number and not kept:
            loss = shadow.add("token_loss", picked.inputs, (), meta=right.meta)
            return shadow.add("neg", (loss,), (), node, right.meta)
    # the loss itself, the other way round: lse - z[target]
    if left.op == "logsumexp" and left.attrs[0] == (-1,):
        picked = right.inputs[0] if right.op == "reshape" else right
        if picked.op != "gather" or picked.inputs[0].number != left.inputs[0].number:
            return None
        if picked.attrs and right is picked and not left.attrs[1]:
            value = shadow.add("log_probability", picked.inputs, picked.attrs, meta=left.meta)
            return shadow.add("neg", (value,), (), node, left.meta)
        if not picked.attrs and (right is picked) == left.attrs[1]:
            if left.attrs[1]:
                value = shadow.add("log_probability", picked.inputs, (), meta=picked.meta)
                return shadow.add("neg", (value,), (), node, picked.meta)
            return shadow.add("token_loss", picked.inputs, (), node, left.meta)
    return None


def _widest(left: Value, right: Value) -> Any:
    metas = [v.meta for v in (left, right) if v.meta is not None]
    return max(metas, key=lambda m: (m.ndim, m.numel()), default=None)


@rule(aten.mul, aten.multiply, operator.mul)
def _mul(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    left, right = (operand(shadow, a) for a in args[:2])
    if left is None or right is None or tensor_meta(node) is None:
        return None
    return product(shadow, node, left, right)


def product(shadow: Shadow, node: fx.Node | None, left: Value, right: Value) -> Value:
    meta = _widest(left, right)
    for a, b in ((left, right), (right, left)):
        if b.op == "const" and b.const == 1.0 and (node is None or tensor_meta(node) == a.meta):
            return a
        if a.op == "reshape" and b.op == "const" and (squeezed := before_squeeze(a)) is not None:
            return shadow.add("reshape", (product(shadow, None, squeezed, b),), a.attrs, node, a.meta)
        if a.op == "neg":  # signs move outwards, so that `a + (-b) * c` is a difference
            return negated(shadow, product(shadow, None, a.inputs[0], b), node)
        if b.op == "const" and b.const == -1.0:
            return negated(shadow, a, node)
        if a.op == "complex" and b.op != "const":
            return complex_product(shadow, node, a, b)
        if b.op == "const" and (mean := _as_mean(shadow, node, a, b.const)) is not None:
            return mean
        if (softmax := _as_softmax(shadow, node, a, b)) is not None:
            return softmax
        if a.op == "square" and a.inputs[0].number == b.number:
            return shadow.add("pow", (b, shadow.const(3.0)), (), node, meta)
    if left.number == right.number:
        return shadow.add("square", (left,), (), node, meta)
    value = shadow.add("mul", (left, right), (), node, meta)
    known = activation(value)
    return value if known is None else shadow.replace(value, *known)


def complex_product(shadow: Shadow, node: fx.Node | None, left: Value, right: Value) -> Value:
    """(a + bi)(c + di) by parts, of which the left ones are known."""
    (a, b), (c, d) = left.inputs, parts_of(shadow, right)
    real = minus(shadow, None, product(shadow, None, a, c), product(shadow, None, b, d))
    imaginary = plus(shadow, None, product(shadow, None, b, c), product(shadow, None, a, d))
    return shadow.add("complex", (real, imaginary), (), node)


def parts_of(shadow: Shadow, value: Value) -> tuple[Value, Value]:
    """Real and imaginary part of a complex value."""
    if value.op == "complex":
        return value.inputs
    return shadow.add("real", (value,)), shadow.add("imag", (value,))


@rule(aten.div, aten.divide, aten.true_divide, operator.truediv)
def _div(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    left, right = (operand(shadow, a) for a in args[:2])
    if left is None or right is None or tensor_meta(node) is None:
        return None
    if len(args) > 2 and args[2] is not None:
        return None  # floor or truncating division
    if right.op == "const":
        if right.const == 0.0 or not math.isfinite(right.const):
            return None
        return product(shadow, node, left, shadow.const(1.0 / right.const))
    if left.op == "const" and left.const == 1.0:
        return inverse(shadow, right, node)
    return product(shadow, node, left, inverse(shadow, right, None))


def _as_mean(shadow: Shadow, node: fx.Node | None, total: Value, factor: float) -> Value | None:
    """sum * (1 / n) is mean; sqrt(sum) * (1 / sqrt(n)) is sqrt(mean)."""
    root = total.op == "sqrt"
    total = total.inputs[0] if root else total
    source = total.inputs[0].meta if total.op == "sum" else None
    if source is None or not all(source.static[d] for d in total.attrs[0]):
        return None
    count = math.prod(source.shape[d] for d in total.attrs[0])
    if not count or factor <= 0 or not math.isclose((factor * factor if root else factor) * count, 1.0, rel_tol=1e-6):
        return None
    if root:
        return shadow.add(
            "sqrt", (shadow.add("mean", total.inputs, total.attrs, meta=total.meta),), (), node, total.meta
        )
    return shadow.add("mean", total.inputs, total.attrs, node, total.meta)


def _as_softmax(shadow: Shadow, node: fx.Node | None, top: Value, bottom: Value) -> Value | None:
    """exp(x - max) / sum(exp(x - max)), with or without the maximum."""
    if top.op != "exp" or bottom.op != "reciprocal" or bottom.inputs[0].op != "sum":
        return None
    total = bottom.inputs[0]
    dims, keepdim = total.attrs
    if total.inputs[0].number != top.number or len(dims) != 1 or not keepdim:
        return None
    return shadow.add("softmax", (without_maximum(top.inputs[0], dims[0]),), dims, node, top.meta)
