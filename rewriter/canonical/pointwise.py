"""Canonical form of pointwise operators, sums and means: powers, quotients and means have one spelling each."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import fx

from rewriter.canonical.table import aten, cast, negative, operand, rule
from rewriter.meta import tensor_meta
from rewriter.shadow import Shadow, Value

_UNARY = {
    aten.neg: "neg",
    aten.rsqrt: "rsqrt",
    aten.sqrt: "sqrt",
    aten.exp: "exp",
    aten.log: "log",
    aten.tanh: "tanh",
    aten.sigmoid: "sigmoid",
    aten.silu: "silu",
    aten.relu: "relu",
    aten.erf: "erf",
    aten.abs: "abs",
    aten.square: "square",
    aten.cos: "cos",
    aten.sin: "sin",
    aten.softplus: "softplus",
}


@rule(*_UNARY)
def _unary(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    packet = node.target.overloadpacket
    rest = tuple(a for a in args[1:] if a is not None)
    return shadow.add(_UNARY[packet], (args[0],), () if packet is not aten.softplus else rest, node)


@rule(aten.gelu)
def _gelu(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    return shadow.add("gelu_tanh" if args[1] == "tanh" else "gelu", (args[0],), (), node)


@rule(aten.reciprocal)
def _reciprocal(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    if args[0].op == "sqrt":
        return shadow.add("rsqrt", args[0].inputs, (), node)
    return shadow.add("reciprocal", (args[0],), (), node)


@rule(aten.pow)
def _pow(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    base, exponent = (operand(shadow, a) for a in args[:2])
    if base is None or exponent is None:
        return None
    names = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt"}
    if exponent.op == "const" and exponent.const in names:
        return shadow.add(names[exponent.const], (base,), (), node)
    if exponent.op == "const" and exponent.const == -1.0:
        return _reciprocal(shadow, node, [base])
    return shadow.add("pow", (base, exponent), (), node)


@rule(aten.add, aten.sub, aten.rsub, operator.add, operator.sub)
def _add(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    packet = getattr(node.target, "overloadpacket", node.target)
    left, right = (operand(shadow, a) for a in args[:2])
    if left is None or right is None or (len(args) > 2 and args[2] != 1) or tensor_meta(node) is None:
        return None
    if packet is aten.rsub:
        left, right = right, left
    if packet in (aten.add, operator.add):
        return shadow.add("add", (left, right), (), node)
    return shadow.add("sub", (left, right), (), node)


@rule(aten.mul, operator.mul)
def _mul(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    left, right = (operand(shadow, a) for a in args[:2])
    if left is None or right is None or tensor_meta(node) is None:
        return None
    return product(shadow, node, left, right)


def product(shadow: Shadow, node: fx.Node, left: Value, right: Value) -> Value:
    if left.number == right.number:
        return shadow.add("square", (left,), (), node)
    for a, b in ((left, right), (right, left)):
        if a.op == "sigmoid" and a.inputs[0].number == b.number:
            return shadow.add("silu", (b,), (), node)
        if a.op == "sum" and b.op == "const" and (mean := _as_mean(shadow, node, a, b.const)) is not None:
            return mean
    return shadow.add("mul", (left, right), (), node)


@rule(aten.div, operator.truediv)
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
        return _reciprocal(shadow, node, [right])
    inverse = ("rsqrt", right.inputs) if right.op == "sqrt" else ("reciprocal", (right,))
    return product(shadow, node, left, shadow.add(*inverse, meta=right.meta))


def _dims(given: Any, ndim: int) -> tuple[int, ...]:
    dims = range(ndim) if given is None or given == [] else given if isinstance(given, list) else [given]
    return tuple(sorted(negative(d, ndim) for d in dims))


@rule(aten.mean, aten.sum)
def _reduce(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value = args[0]
    if value.meta is None:
        return None
    name = "mean" if node.target.overloadpacket is aten.mean else "sum"
    whole = len(args) <= 2  # the overload without dims: (self, dtype)
    dims = _dims(None if whole else args[1], value.meta.ndim)
    keepdim = False if whole else bool(args[2])
    dtype = args[-1]
    if dtype is not None:
        value = cast(shadow, value, dtype)
    return shadow.add(name, (value,), (dims, keepdim), node)


def _as_mean(shadow: Shadow, node: fx.Node, total: Value, factor: float) -> Value | None:
    source = total.inputs[0].meta
    if source is None or not all(source.static[d] for d in total.attrs[0]):
        return None
    count = math.prod(source.shape[d] for d in total.attrs[0])
    if count and math.isclose(factor * count, 1.0, rel_tol=1e-9):
        return shadow.add("mean", total.inputs, total.attrs, node)
    return None
