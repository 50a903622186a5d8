"""Canonical form of losses. The classes are the last dimension of the logits, whatever layout the model gave them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from rewriter.canonical.table import aten, negative, rule
from rewriter.meta import tensor_meta
from rewriter.shadow import Shadow, Value, is_row_operator


@rule(aten.cross_entropy_loss)
def _cross_entropy(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    logits, target, weight, reduction, ignore_index, smoothing = args[:6]
    logits = _classes_last(logits)
    return _loss(shadow, node, logits, target, weight, (int(reduction), int(ignore_index), float(smoothing), 0.0))


@rule(aten.nll_loss_nd, aten.nll_loss, aten.nll_loss2d)
def _nll(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    given, target, weight, reduction, ignore_index = args[:5]
    logits = _before_log_softmax(shadow, given)
    if logits is None:
        return None
    return _loss(shadow, node, logits, target, weight, (int(reduction), int(ignore_index), 0.0, 0.0))


def _before_log_softmax(shadow: Shadow, given: Value) -> Value | None:
    """The logits, classes last, of log-probabilities that were cut or reshaped by rows afterwards."""
    last = _classes_last(given)
    if last is not None and last.op == "log_softmax" and last.attrs == (-1,):
        return last.inputs[0]
    if given.op == "log_softmax" and given.meta is not None and given.attrs[0] + given.meta.ndim == 1:
        return _classes_last(given.inputs[0])  # classes in dimension 1 all along
    steps, value = [], last
    while value is not None and is_row_operator(value):
        steps.append(value)
        value = value.inputs[0]
    if value is None or value.op != "log_softmax" or value.attrs != (-1,):
        return None
    value = value.inputs[0]
    for step in reversed(steps):
        value = shadow.add(step.op, (value,), step.attrs, meta=step.meta, unique=True)
    return value


def _loss(shadow: Shadow, node: fx.Node, logits: Value | None, target: Any, weight: Any, attrs: tuple) -> Value | None:
    if logits is None or logits.meta is None or target.meta is None or target.meta.dtype.is_floating_point:
        return None  # class probabilities as targets
    if logits.meta.shape[:-1] != target.meta.shape:
        return None
    inputs = (logits, target) if weight is None else (logits, target, weight)
    return shadow.add("cross_entropy", inputs, attrs, node)


def _classes_last(logits: Value) -> Value | None:
    """[N, V] as it is; [N, V, ...] where it is a permuted [N, ..., V]."""
    meta = logits.meta
    if meta is None:
        return None
    if meta.ndim <= 2:
        return logits
    back = (0, *range(2, meta.ndim), 1)
    if logits.op == "permute" and tuple(logits.attrs[0][d] for d in back) == tuple(range(meta.ndim)):
        return logits.inputs[0]
    if logits.op in ("cast", "copy") and logits.inputs[0].op == "permute":
        return _classes_last(logits.inputs[0])
    return None


@rule(aten.gather, aten.take_along_dim)
def _gather(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    """One entry of the last dimension for each row."""
    value, dim, index = args[:3]
    if node.target.overloadpacket is aten.take_along_dim:
        dim, index = index, dim
    if value.meta is None or index.meta is None or dim is None or negative(dim, value.meta.ndim) != -1:
        return None
    if index.meta.shape != (*value.meta.shape[:-1], 1) or index.meta.static[:-1] != value.meta.static[:-1]:
        return None
    return _picked(shadow, node, value, index, ())


def _picked(shadow: Shadow, node: fx.Node, value: Value, index: Value, attrs: tuple) -> Value:
    """The entries of `value` at `index`: of log-probabilities, of their negatives, or of anything."""
    if value.op == "neg":
        picked = _picked(shadow, None, value.inputs[0], index, attrs)
        return shadow.add("neg", (picked,), (), node)
    meta = replace(index.meta, dtype=value.meta.dtype, requires_grad=value.meta.requires_grad)
    if value.op == "log_softmax" and value.attrs == (-1,):
        return shadow.add("log_probability", (value.inputs[0], index), attrs, node, meta)
    return shadow.add("gather", (value, index), attrs, node, meta)


@rule(aten.index)
def _index(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    """`log_probabilities[arange(n), target]`, or the same of logits."""
    value, indices = args[:2]
    if value.meta is None or len(indices) != 2 or tensor_meta(node) is None:
        return None
    rows, target = indices
    if not isinstance(rows, Value) or not isinstance(target, Value) or rows.op != "opaque:arange":
        return None
    whole = rows.meta is not None and rows.node.args[0] is not None and len(rows.node.args) == 1
    if not whole or value.meta.ndim != 2 or target.meta is None or target.meta.shape != value.meta.shape[:1]:
        return None
    if not (rows.meta.static == target.meta.static == value.meta.static[:1]) or rows.meta.shape != target.meta.shape:
        return None
    return _picked(shadow, node, value, target, ("row",))


def one_hot_loss(shadow: Shadow, node: fx.Node | None, product: Value) -> Value | None:
    """`(one_hot(target) * log_probabilities).sum(-1)`: the logarithm of the target's probability."""
    for table, other in (product.inputs, product.inputs[::-1]) if product.op == "mul" else ():
        while table.op == "cast":
            table = table.inputs[0]
        if table.op != "opaque:one_hot" or other.op != "log_softmax" or other.attrs != (-1,):
            continue
        target = table.inputs[0]
        if target.meta is None or other.meta is None:
            continue
        if (target.meta.shape, target.meta.static) == (other.meta.shape[:-1], other.meta.static[:-1]):
            return _picked(shadow, node, other, target, ("row",))
    return None
