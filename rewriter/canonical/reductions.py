"""Canonical form of reductions: sums, means, variances, norms, softmax and its logarithm."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from rewriter.canonical.losses import one_hot_loss
from rewriter.canonical.table import TRANSPARENT, aten, cast, negative, rule
from rewriter.meta import TensorMeta, tensor_meta
from rewriter.shadow import Shadow, Value


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
    return reduction(shadow, node, name, value, dims, keepdim)


def reduction(
    shadow: Shadow, node: fx.Node | None, name: str, value: Value, dims: tuple[int, ...], keepdim: bool
) -> Value:
    """A mean or sum; over the last dimension it keeps it, and a model that doesn't drops it afterwards."""
    meta = value.meta
    if value.op == "neg" and meta is not None:
        return shadow.add("neg", (reduction(shadow, None, name, value.inputs[0], dims, keepdim),), (), node, meta)
    if name == "sum" and dims == (-1,) and not keepdim and (loss := one_hot_loss(shadow, node, value)) is not None:
        return loss
    if keepdim or dims != (-1,) or not all(meta.static):
        return shadow.add(name, (value,), (dims, keepdim), node)
    kept = TensorMeta((*meta.shape[:-1], 1), meta.stride, meta.dtype, meta.device, meta.requires_grad, meta.static)
    wide = shadow.add(name, (value,), (dims, True), meta=kept)
    dropped = TensorMeta(
        meta.shape[:-1], meta.stride[:-1], meta.dtype, meta.device, meta.requires_grad, meta.static[:-1]
    )
    return shadow.add("reshape", (wide,), (dropped.shape,), node, None if node is not None else dropped)


@rule(aten.amax)
def _amax(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    if args[0].meta is None:
        return None
    return shadow.add("amax", (args[0],), (_dims(args[1], args[0].meta.ndim), bool(args[2])), node)


def largest(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    """`x.max(dim)`: values and indices."""
    if args[0].meta is None or len(args) < 3 or not isinstance(args[1], int):
        return None
    largest = shadow.add("amax", (args[0],), (_dims(args[1], args[0].meta.ndim), bool(args[2])))
    return shadow.add("results", (largest, shadow.add("opaque:argmax", args[:1], unique=True)), (), node)


@rule(aten.var, aten.std, aten.var_mean)
def _variance(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    """The biased variance as the mean of the squared distance from the mean, the unbiased one as a multiple of that."""
    value, packet = args[0], node.target.overloadpacket
    if value.meta is None or len(args) < 4:
        return None
    by_flag = (
        node.target._overloadname == "dim"
    )  # (self, dim, unbiased, keepdim), else (self, dim, correction, keepdim)
    correction = int(args[2] is not False) if by_flag else 1 if args[2] is None else args[2]
    if correction not in (0, 1):
        return None
    dims, keepdim = _dims(args[1], value.meta.ndim), bool(args[3])
    mean = shadow.add("mean", (value,), (dims, True))
    squares = shadow.add("square", (shadow.add("sub", (value, mean), meta=value.meta),), meta=value.meta)
    count = math.prod(value.meta.shape[d] for d in dims)
    if correction and (count < 2 or not all(value.meta.static[d] for d in dims)):
        return None
    if packet is aten.var and not correction:
        return reduction(shadow, node, "mean", squares, dims, keepdim)
    variance = shadow.add("mean", (squares,), (dims, keepdim), meta=tensor_meta(node))
    if correction:
        larger = variance, shadow.const(count / (count - 1))
        variance = shadow.add("mul", larger, (), node if packet is aten.var else None, tensor_meta(node))
    if packet is aten.var:
        return variance
    if packet is aten.std:
        return shadow.add("sqrt", (variance,), (), node)
    return shadow.add("results", (variance, shadow.add("mean", (value,), (dims, keepdim))), (), node)


@rule(aten.linalg_vector_norm, aten.linalg_norm, aten.norm)
def _norm(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    """The 2-norm as the root of a sum of squares."""
    value, order, dims, keepdim, *rest = [*args, None, None, None][:5]
    if value.meta is None or order not in (None, 2, 2.0, "fro") or tensor_meta(node) is None:
        return None
    dims = _dims(dims, value.meta.ndim)
    if len(dims) > 1 and node.target.overloadpacket is aten.linalg_norm:
        return None  # the norm of a matrix
    if rest and rest[0] is not None:
        value = cast(shadow, value, rest[0])
    squares = shadow.add("square", (value,), meta=value.meta)
    total = shadow.add("sum", (squares,), (dims, bool(keepdim)), meta=tensor_meta(node))
    return shadow.add("sqrt", (total,), (), node)


@rule(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.special_softmax, aten.special_log_softmax)
def _softmax(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, packet = args[0], node.target.overloadpacket
    if value.meta is None:
        return None
    dtype = args[2] if packet not in (aten._softmax, aten._log_softmax) else None
    if dtype is not None:
        value = cast(shadow, value, dtype)
    name = "log_softmax" if "log" in packet.__name__ else "softmax"
    dim = negative(args[1], value.meta.ndim)
    return shadow.add(name, (without_maximum(value, dim),), (dim,), node)


def without_maximum(value: Value, dim: int) -> Value:
    """x in the place of `x - max(x)`, of which the softmax is the same."""
    inner = value
    while inner.op in TRANSPARENT:
        inner = inner.inputs[0]
    if inner.op != "sub":
        return value
    scores, largest = inner.inputs
    while largest.op in (*TRANSPARENT, "opaque:detach"):
        largest = largest.inputs[0]
    same = largest.op == "amax" and largest.attrs == ((dim,), True) and largest.inputs[0].number == scores.number
    return scores if same else value


@rule(aten.logsumexp)
def _logsumexp(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    if args[0].meta is None:
        return None
    return shadow.add("logsumexp", (args[0],), (_dims(args[1], args[0].meta.ndim), bool(args[2])), node)
