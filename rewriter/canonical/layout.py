"""Canonical form of what moves or retypes values: casts, copies, views, slices, concatenations.

Slices are fractions of the size they cut, so one reference serves every width. Pairs of features have one form however
they are cut out: `x[..., ::2]` equals `x.view(..., d // 2, 2)[..., 0]`, and a flattened `stack` is a `cat`.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import fx

from rewriter.canonical.table import TRANSPARENT, aten, negative, rule
from rewriter.meta import TensorMeta, hint, tensor_meta
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


@rule(aten.item)
def _item(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    """A number that changes between calls comes into a graph as a tensor without dimensions."""
    meta = args[0].meta
    return args[0] if meta is not None and not meta.ndim and meta.dtype.is_floating_point else None


@rule(aten.clone, aten.contiguous)
def _copy(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    return shadow.add("copy", (args[0],), (), node)


@rule(aten.dropout)
def _dropout(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    if args[1] == 0.0 or args[2] is False:
        return args[0]
    return shadow.add("dropout", (args[0],), (float(args[1]),), node, unique=True)


@rule(aten.view, aten.reshape, aten._unsafe_view, aten.view_as, aten.reshape_as, aten.unsqueeze, aten.squeeze)
@rule(aten.flatten, aten.unflatten)
def _reshape(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    meta = tensor_meta(node)
    if meta is None or args[0].meta is None or meta.dtype != args[0].meta.dtype:
        return None
    if meta.shape == args[0].meta.shape and all(meta.static) and all(args[0].meta.static):
        return args[0] if meta.stride == args[0].meta.stride else shadow.add("copy", (args[0],), (), node)
    source = args[0].inputs[0] if args[0].op == "reshape" else None
    if source is not None and source.node is None and source.meta is not None and source.meta.shape == meta.shape:
        # a dimension that was dropped in the shadow only is back
        return shadow.add(source.op, source.inputs, source.attrs, node)
    if args[0].op == "stack" and (joined := _joined(shadow, node, args[0], meta)) is not None:
        return joined
    return shadow.add("reshape", (args[0],), (meta.shape,), node, unique=not all(meta.static))


def _joined(shadow: Shadow, node: fx.Node, stack: Value, meta: TensorMeta) -> Value | None:
    """A stack along one of the last two dimensions, both flattened into one: a concatenation or an interleaving."""
    shape = stack.meta.shape
    if meta.shape != (*shape[:-2], math.prod(shape[-2:])) or not all(stack.meta.static[-2:]):
        return None
    if stack.attrs[0] == -1:
        return shadow.add("interleave", stack.inputs, (), node)
    return shadow.add("cat", stack.inputs, (-1,), node) if stack.attrs[0] == -2 else None


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
    shadow: Shadow, node: fx.Node | None, value: Value, dim: int, start: int, end: int, step: int
) -> Value | None:
    """A slice as fractions of the size: `x[..., :d // 2]` reads the same for every d.

    attrs: (dim, start, end, 1) with fractions, (dim, "every", step, first) to the end, or with "dynamic" at the end.
    """
    meta = value.meta
    if meta is None:
        return None
    dim = negative(dim, meta.ndim)
    size = meta.shape[dim]
    start, end = (max(0, min(size, x + size if x < 0 else x)) for x in (start, end))
    if (start, end, step) == (0, size, 1):
        return value
    if value.op == "stack" and value.attrs == (dim,) and end == start + 1:
        shape = (*value.inputs[start].meta.shape, 1) if dim == -1 and value.inputs[start].meta is not None else None
        if shape is not None and meta.static[-1]:
            return shadow.add("reshape", (value.inputs[start],), (shape,), node, unique=not all(meta.static))
    if not meta.static[dim]:
        return shadow.add("slice", (value,), (dim, start, end, step, "dynamic"), node, unique=True)
    shape = list(meta.shape)
    shape[dim] = max(0, -(-(end - start) // step))
    new = TensorMeta(tuple(shape), meta.stride, meta.dtype, meta.device, meta.requires_grad, meta.static)
    attrs: tuple = (dim, Fraction(start, size or 1), Fraction(end, size or 1), step)
    if step > 1 and start < step and end > size - step:
        attrs = (dim, "every", step, start)
    return shadow.add("slice", (value,), attrs, node, meta=None if node is not None else new)


def _without_sink(shadow: Shadow, node: fx.Node | None, value: Value, given: tuple, exact: bool) -> Value | None:
    """`softmax(cat([scores, sink]))[..., :-1]`, or with the sink first: probabilities of which a sink took its share.

    given: start and end as the model wrote them; exact: whether they are what they are for every size.
    """
    casts, inner = [], value
    while inner.op in TRANSPARENT:
        casts.append(inner)
        inner = inner.inputs[0]
    if inner.op != "softmax" or inner.attrs != (-1,):
        return None
    joined = inner.inputs[0]
    while joined.op in TRANSPARENT:
        joined = joined.inputs[0]
    if joined.op != "cat" or joined.attrs != (-1,) or len(joined.inputs) != 2:
        return None
    size, (start, end) = value.meta.shape[-1], given
    if start in (None, 0) and (end == -1 or (exact and end == size - 1)):
        scores, sink = joined.inputs
    elif start == 1 and (end is None or end >= 2**31 or (exact and end >= size)):
        sink, scores = joined.inputs
    else:
        return None
    if sink.meta is None or sink.meta.shape[-1] != 1 or not sink.meta.static[-1]:
        return None
    result = shadow.add("sink_softmax", (scores, sink), (), None if casts else node, meta=scores.meta)
    for i, step in enumerate(reversed(casts)):
        last = i == len(casts) - 1
        result = shadow.add(step.op, (result,), step.attrs, node if last else None, meta=step.meta)
    return result


def _select_value(shadow: Shadow, node: fx.Node, value: Value, dim: int, index: int) -> Value | None:
    """One position along a dimension, which disappears."""
    meta = value.meta
    if meta is None or tensor_meta(node) is None:
        return None
    dim = negative(dim, meta.ndim)
    size = meta.shape[dim]
    index = index + size if index < 0 else index
    pairs = _split_last(value)
    if pairs is not None and dim in (-1, -2):
        source, width = pairs, meta.shape[-1]
        if dim == -1:
            return _slice_value(shadow, node, source, -1, index, source.meta.shape[-1], width)
        return _slice_value(shadow, node, source, -1, index * width, (index + 1) * width, 1)
    if not meta.static[dim]:
        return None
    part = _slice_value(shadow, None, value, dim, index, index + 1, 1)
    return shadow.add("reshape", (part,), (tensor_meta(node).shape,), node, unique=not all(tensor_meta(node).static))


def part_of_pairs(shadow: Shadow, value: Value, index: int) -> Value | None:
    """`value[..., index]` of a tensor whose last dimension holds pairs."""
    meta = value.meta
    if meta is None or not meta.ndim or meta.shape[-1] != 2:
        return None
    if value.op == "stack" and value.attrs == (-1,):
        return value.inputs[index]
    source = _split_last(value)
    if source is not None:
        return _slice_value(shadow, None, source, -1, index, source.meta.shape[-1], 2)
    part = _slice_value(shadow, None, value, -1, index, index + 1, 1)
    return shadow.add("reshape", (part,), (meta.shape[:-1],), unique=not all(meta.static))


def _split_last(value: Value) -> Value | None:
    """The tensor whose last dimension was split in two by this reshape."""
    if value.op != "reshape" or value.inputs[0].meta is None:
        return None
    before, after = value.inputs[0].meta, value.meta
    split = after.ndim == before.ndim + 1 and after.shape[:-2] == before.shape[:-1]
    return value.inputs[0] if split and before.static[-1] and all(after.static[-2:]) else None


@rule(aten.select)
def _select(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, dim, index = args[:3]
    return _select_value(shadow, node, value, dim, index) if isinstance(index, int) else None


@rule(aten.unbind)
def _unbind(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, dim = args[:2]
    if value.meta is None:
        return None
    return shadow.add("positions", (value,), (negative(dim, value.meta.ndim),), node)


@rule(aten.slice)
def _slice(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, dim, start, end, step = args[:5]
    if value.meta is not None and step == 1 and negative(dim, value.meta.ndim) == -1:
        given = tuple(b if isinstance(b, int | None) else None for b in (start, end))
        if given == (start, end):
            without = _without_sink(shadow, node, value, given, value.meta.static[-1])
            if without is not None:
                return without
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
    if not isinstance(parts, Value) or tensor_meta(node) is None:
        return None
    if parts.op == "positions":
        return _select_value(shadow, node, parts.inputs[0], parts.attrs[0], args[1])
    if parts.op == "results":
        result = parts.inputs[args[1]]
        return shadow.add(result.op, result.inputs, result.attrs, node)
    if parts.op != "parts":
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
    name, dim = "stack" if node.target.overloadpacket is aten.stack else "cat", negative(args[1], meta.ndim)
    narrow = [unsqueezed(part) for part in parts]
    if name == "cat" and dim in (-1, -2) and None not in narrow:  # of tensors with a last dimension of 1
        if dim == -1:
            return shadow.add("stack", tuple(narrow), (-1,), node)
        shape, stride, static = meta.shape[:-1], meta.stride[:-1], meta.static[:-1]
        joined = shadow.add("cat", tuple(narrow), (-1,), meta=replace(meta, shape=shape, stride=stride, static=static))
        return shadow.add("reshape", (joined,), (meta.shape,), node, unique=not all(meta.static))
    return shadow.add(name, tuple(parts), (dim,), node)


def unsqueezed(value: Value) -> Value | None:
    """Where a reshape only adds a last dimension of 1: the tensor without it."""
    source = value.inputs[0] if value.op == "reshape" else None
    if source is None or source.meta is None or value.meta is None or value.meta.shape != (*source.meta.shape, 1):
        return None
    return source


@rule(aten.roll)
def _roll(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, shifts, dims = args[:3]
    if value.meta is None or len(shifts) != 1 or len(dims) != 1 or not isinstance(shifts[0], int):
        return None
    dim = negative(dims[0], value.meta.ndim)
    size = value.meta.shape[dim]
    if not size or not value.meta.static[dim]:
        return None
    cut = size - shifts[0] % size
    parts = [_slice_value(shadow, None, value, dim, *span, 1) for span in ((cut, size), (0, cut))]
    return shadow.add("cat", tuple(parts), (dim,), node)
