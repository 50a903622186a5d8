"""Rules of the canonical form: one function per family of ATen operators, in one table.

Each rule takes (shadow, node, operands) and gives the canonical value of the node; None leaves the node opaque.
Operands are values for tensors and constants alike, so commutative operators need no special case for scalars.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from rewriter.meta import TensorMeta, hint, tensor_meta
from rewriter.shadow import Shadow, Value

aten = torch.ops.aten
Rule = Callable[[Shadow, fx.Node, list[Any]], Value | None]
RULES: dict[Any, Rule] = {}

COMMUTATIVE = {"add", "mul"}
# Seen through by the matcher on the edges inside a pattern (it records what it saw).
TRANSPARENT = {"cast", "copy"}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


def canonical_value(shadow: Shadow, node: fx.Node) -> Value | None:
    """The canonical value of one call node, or None where no rule applies."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    function = RULES.get(target)
    if function is None or node.kwargs.get("out") is not None:
        return None
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        return None
    value = function(shadow, node, _arguments(shadow, node))
    return None if value is None else _explicit_autocast(shadow, node, value)


def _arguments(shadow: Shadow, node: fx.Node) -> list[Any]:
    """Positional arguments with defaults filled in by the schema; nodes as values."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [_argument(shadow, a) for a in node.args]
    arguments = []
    for i, spec in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            given = node.args[i]
        elif spec.name in node.kwargs:
            given = node.kwargs[spec.name]
        else:
            given = spec.default_value
        arguments.append(_argument(shadow, given))
    return arguments


def _argument(shadow: Shadow, given: Any) -> Any:
    if isinstance(given, fx.Node):
        return shadow.of.get(given, given)
    if isinstance(given, list | tuple):
        return [_argument(shadow, g) for g in given]
    return given


def _operand(shadow: Shadow, given: Any) -> Value | None:
    """A tensor or number as a value; None for anything else (a symbolic size, say)."""
    if isinstance(given, Value):
        return given
    if isinstance(given, bool | int | float):
        return shadow.const(float(given))
    return None


def _explicit_autocast(shadow: Shadow, node: fx.Node, value: Value) -> Value:
    """Where ambient autocast computed in another type than the operands', show the casts it made.

    Autocast leaves no trace in the graph but the dtype of the result; every float operand was cast to that type.
    """
    ambient = node.meta.get("ambient")
    if ambient is None or not ambient[1] or value.meta is None or value.op in TRANSPARENT or value.node is not node:
        return value
    dtype = value.meta.dtype
    kinds = {i.meta.dtype for i in value.inputs if i.meta is not None and i.meta.dtype.is_floating_point}
    if not dtype.is_floating_point or not kinds or _promoted(kinds) == dtype:
        return value
    inputs = tuple(_cast(shadow, i, dtype) for i in value.inputs)
    return shadow.add(value.op, inputs, value.attrs, node)


def _promoted(kinds: set[torch.dtype]) -> torch.dtype:
    result = next(iter(kinds))
    for kind in kinds:
        result = torch.promote_types(result, kind)
    return result


def _cast(shadow: Shadow, value: Value, dtype: torch.dtype) -> Value:
    meta = value.meta
    if meta is None or meta.dtype == dtype or not meta.dtype.is_floating_point:
        return value
    changed = TensorMeta(meta.shape, meta.stride, dtype, meta.device, meta.requires_grad, meta.static)
    return shadow.add("cast", (value,), (dtype,), meta=changed)


# ---- pointwise -----------------------------------------------------------------------------------------------------

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
    base, exponent = (_operand(shadow, a) for a in args[:2])
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
    left, right = (_operand(shadow, a) for a in args[:2])
    if left is None or right is None or (len(args) > 2 and args[2] != 1) or tensor_meta(node) is None:
        return None
    if packet is aten.rsub:
        left, right = right, left
    if packet in (aten.add, operator.add):
        return shadow.add("add", (left, right), (), node)
    return shadow.add("sub", (left, right), (), node)


@rule(aten.mul, operator.mul)
def _mul(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    left, right = (_operand(shadow, a) for a in args[:2])
    if left is None or right is None or tensor_meta(node) is None:
        return None
    return _product(shadow, node, left, right)


def _product(shadow: Shadow, node: fx.Node, left: Value, right: Value) -> Value:
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
    left, right = (_operand(shadow, a) for a in args[:2])
    if left is None or right is None or tensor_meta(node) is None:
        return None
    if len(args) > 2 and args[2] is not None:
        return None  # floor or truncating division
    if right.op == "const":
        if right.const == 0.0 or not math.isfinite(right.const):
            return None
        return _product(shadow, node, left, shadow.const(1.0 / right.const))
    if left.op == "const" and left.const == 1.0:
        return _reciprocal(shadow, node, [right])
    inverse = ("rsqrt", right.inputs) if right.op == "sqrt" else ("reciprocal", (right,))
    return _product(shadow, node, left, shadow.add(*inverse, meta=right.meta))


# ---- reductions ----------------------------------------------------------------------------------------------------


def _negative(dim: int, ndim: int) -> int:
    return dim - ndim if dim >= 0 else dim


def _dims(given: Any, ndim: int) -> tuple[int, ...]:
    dims = range(ndim) if given is None or given == [] else given if isinstance(given, list) else [given]
    return tuple(sorted(_negative(d, ndim) for d in dims))


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
        value = _cast(shadow, value, dtype)
    return shadow.add(name, (value,), (dims, keepdim), node)


def _as_mean(shadow: Shadow, node: fx.Node, total: Value, factor: float) -> Value | None:
    source = total.inputs[0].meta
    if source is None or not all(source.static[d] for d in total.attrs[0]):
        return None
    count = math.prod(source.shape[d] for d in total.attrs[0])
    if count and math.isclose(factor * count, 1.0, rel_tol=1e-9):
        return shadow.add("mean", total.inputs, total.attrs, node)
    return None


# ---- casts and copies ----------------------------------------------------------------------------------------------


@rule(aten.to, aten._to_copy, aten.type_as)
def _to(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    source, meta = args[0], tensor_meta(node)
    if source.meta is None or meta is None or source.meta.device != meta.device:
        return None
    if source.meta.dtype != meta.dtype:
        return shadow.add("cast", (source,), (meta.dtype,), node)
    return source if source.meta.stride == meta.stride else shadow.add("copy", (source,), (), node)


@rule(aten.alias, aten.lift_fresh)
def _alias(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    return args[0]


@rule(aten.clone, aten.contiguous)
def _copy(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    return shadow.add("copy", (args[0],), (), node)


@rule(aten.dropout)
def _dropout(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    return args[0] if args[1] == 0.0 or args[2] is False else None


# ---- shapes --------------------------------------------------------------------------------------------------------


@rule(aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten)
def _reshape(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    meta = tensor_meta(node)
    if meta is None or args[0].meta is None or meta.dtype != args[0].meta.dtype:
        return None
    if meta.shape == args[0].meta.shape and all(meta.static) and all(args[0].meta.static):
        return args[0] if meta.stride == args[0].meta.stride else shadow.add("copy", (args[0],), (), node)
    return shadow.add("reshape", (args[0],), (meta.shape,), node, unique=not all(meta.static))


@rule(aten.expand, aten.expand_as, aten.broadcast_to)
def _expand(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    meta = tensor_meta(node)
    return None if meta is None else shadow.add("expand", (args[0],), (meta.shape,), node, unique=not all(meta.static))


@rule(aten.t, aten.transpose, aten.permute, aten.mT, aten.numpy_T, aten.swapaxes, aten.swapdims)
def _permute(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value = args[0]
    if value.meta is None:
        return None
    ndim, packet = value.meta.ndim, node.target.overloadpacket
    order = list(range(ndim))
    if packet is aten.permute:
        order = [d % ndim for d in args[1]]
    elif packet is aten.numpy_T:
        order.reverse()
    elif ndim >= 2:
        a, b = (-2, -1) if packet in (aten.t, aten.mT) else args[1:3]
        order[a], order[b] = order[b], order[a]
    if order == list(range(ndim)):
        return value
    if value.op == "permute":
        before = value.attrs[0]
        if [before[d] for d in order] == list(range(ndim)):
            return value.inputs[0]
    return shadow.add("permute", (value,), (tuple(order),), node)


def _slice_value(
    shadow: Shadow, node: fx.Node, value: Value, dim: int, start: int, end: int, step: int
) -> Value | None:
    """A slice as fractions of the size: `x[..., :d // 2]` reads the same for every d."""
    meta = value.meta
    if meta is None:
        return None
    dim = _negative(dim, meta.ndim)
    size = meta.shape[dim]
    start, end = (max(0, min(size, x + size if x < 0 else x)) for x in (start, end))
    if (start, end, step) == (0, size, 1):
        return value
    if not meta.static[dim]:
        return shadow.add("slice", (value,), (dim, start, end, step, "dynamic"), node, unique=True)
    return shadow.add("slice", (value,), (dim, Fraction(start, size or 1), Fraction(end, size or 1), step), node)


@rule(aten.slice)
def _slice(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, dim, start, end, step = args[:5]
    try:
        bounds = [hint(0 if start is None else start), hint(2**62 if end is None else end), hint(step)]
    except (TypeError, ValueError):
        return None
    return _slice_value(shadow, node, value, dim, *bounds)


@rule(aten.narrow)
def _narrow(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, dim, start, length = args[:4]
    if not isinstance(start, int) or not isinstance(length, int) or value.meta is None:
        return None
    start = start + value.meta.shape[dim] if start < 0 else start
    return _slice_value(shadow, node, value, dim, start, start + length, 1)


@rule(operator.getitem)
def _getitem(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    parts = args[0]
    if not isinstance(parts, Value) or parts.op != "parts" or tensor_meta(node) is None:
        return None
    dim, edges = parts.attrs
    index = args[1] % (len(edges) - 1)
    return _slice_value(shadow, node, parts.inputs[0], dim, edges[index], edges[index + 1], 1)


@rule(aten.chunk, aten.split, aten.split_with_sizes, aten.tensor_split)
def _parts(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, amount, dim = args[:3]
    if value.meta is None:
        return None
    dim, packet = _negative(dim, value.meta.ndim), node.target.overloadpacket
    size = value.meta.shape[dim]
    if not value.meta.static[dim] or packet is aten.tensor_split:
        return None
    if isinstance(amount, list):
        sizes = amount
    else:
        step = -(-size // amount) if packet is aten.chunk else amount
        sizes = [min(step, size - i) for i in range(0, size, max(step, 1))]
    edges = [0]
    for part in sizes:
        if not isinstance(part, int):
            return None
        edges.append(edges[-1] + part)
    return shadow.add("parts", (value,), (dim, tuple(edges)), node)


@rule(aten.cat, aten.concat, aten.concatenate, aten.stack)
def _cat(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    parts, meta = args[0], tensor_meta(node)
    if meta is None or not all(isinstance(p, Value) for p in parts):
        return None
    name = "stack" if node.target.overloadpacket is aten.stack else "cat"
    return shadow.add(name, tuple(parts), (_negative(args[1], meta.ndim),), node)


# ---- products and losses -------------------------------------------------------------------------------------------


@rule(aten.linear)
def _linear(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    return shadow.add("linear", tuple(a for a in args[:3] if a is not None), (), node)


@rule(aten.matmul, aten.mm, operator.matmul)
def _matmul(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    left, right = args[:2]
    if right.op == "permute" and right.inputs[0].meta is not None and right.inputs[0].meta.ndim == 2:
        return shadow.add("linear", (left, right.inputs[0]), (), node)
    return shadow.add("matmul", (left, right), (), node)


@rule(aten.addmm)
def _addmm(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    bias, left, right, beta, alpha = args[:5]
    if (beta, alpha) != (1, 1) or right.op != "permute" or bias.meta is None or bias.meta.ndim != 1:
        return None
    return shadow.add("linear", (left, right.inputs[0], bias), (), node)


@rule(aten.rms_norm)
def _rms_norm(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, shape, weight, eps = args[:4]
    if len(shape) != 1 or value.meta is None:
        return None
    eps = torch.finfo(value.meta.dtype).eps if eps is None else eps
    weights = () if weight is None else (weight,)
    return shadow.add("rms_norm", (value, *weights, shadow.const(float(eps))), (), node)


@rule(aten.cross_entropy_loss)
def _cross_entropy(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    logits, target, weight, reduction, ignore_index, smoothing = args[:6]
    if target.meta is None or target.meta.dtype.is_floating_point:
        return None  # class probabilities as targets
    inputs = (logits, target) if weight is None else (logits, target, weight)
    return shadow.add("cross_entropy", inputs, (int(reduction), int(ignore_index), float(smoothing)), node)
