"""Canonical form of what moves or retypes values: casts, copies, views, slices, concatenations.

Slices are fractions of the size they cut, so one reference serves every width.
"""

from __future__ import annotations

import operator
from fractions import Fraction
from typing import Any

from torch import fx

from rewriter.canonical.table import aten, negative, rule
from rewriter.meta import hint, tensor_meta
from rewriter.shadow import Shadow, Value


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
    dim = negative(dim, meta.ndim)
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
    dim, packet = negative(dim, value.meta.ndim), node.target.overloadpacket
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
    return shadow.add(name, tuple(parts), (negative(args[1], meta.ndim),), node)
