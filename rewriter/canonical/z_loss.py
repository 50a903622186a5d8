"""Canonical form of a loss with a z-loss: a number times the squared logsumexp of the same logits, added to it.

With F.cross_entropy it has to be over the rows that are not ignored: their sum, their plain mean, or each by itself.
Over any others, such as all rows while some are ignored, it is another computation and stays apart.
"""

from __future__ import annotations

import math

from torch import fx

from rewriter.canonical.table import TRANSPARENT
from rewriter.shadow import Shadow, Value, is_row_operator

NONE, MEAN = 0, 1  # ATen's reductions; the third is the sum


def with_z_loss(shadow: Shadow, node: fx.Node, left: Value, right: Value) -> Value | None:
    """`left + right` as one loss, with the z-loss's factor as its last attribute; None if it is something else."""
    for loss, term in ((left, right), (right, left)):
        loss = _peeled(loss)
        inputs, (factor, parts) = loss.inputs, _factors(term)
        if loss.op == "token_loss" and not loss.attrs:
            attrs, found = (factor,), len(parts) == 1 and _squares(parts[0], loss.inputs[0], loss)
        elif loss.op == "cross_entropy" and not loss.attrs[3]:
            inner, found = _of_kept_rows(loss, parts)
            factor *= inner
            attrs = (*loss.attrs[:3], factor)
            if loss.attrs[0] != NONE:  # the mask reads the targets as they were before they were reshaped
                inputs = (inputs[0], _targets(inputs[1]), *inputs[2:])
        else:
            continue
        if found and factor and math.isfinite(factor):
            return shadow.add(loss.op, inputs, attrs, node)
    return None


def _of_kept_rows(loss: Value, parts: list[Value]) -> tuple[float, bool]:
    """(number, whether `parts` multiply to that times the squares of the rows not ignored, reduced as the loss is)."""
    reduction, number = loss.attrs[0], 1.0
    if reduction == MEAN:
        counts = [p for p in parts if p.op == "reciprocal" and _counts_rows(loss, p.inputs[0])]
        parts = [p for p in parts if p not in counts]
        if len(counts) != 1:
            return number, False
    if reduction != NONE:
        if len(parts) != 1 or not _is_total(parts[0]):
            return number, False
        number, parts = _factors(parts[0].inputs[0])
    inverted = False
    if len(parts) == 1 and parts[0].op == "where":
        condition, kept, other = parts[0].inputs
        if kept.const == 0:
            kept, other, inverted = other, kept, True
        inner, parts = _factors(kept)
        number, parts = number * inner, [*parts, condition] if other.const == 0 else []
    squares = [p for p in parts if p.op == "square"]
    masks = [p for p in parts if p.op != "square"]
    if len(squares) != 1 or len(masks) != 1 or not _is_mask(loss, masks[0], inverted):
        return number, False
    return number, _squares(squares[0], loss.inputs[0], masks[0], *[loss][: reduction == NONE])


def _squares(value: Value, logits: Value, *aligned: Value) -> bool:
    """Whether a value is the squared logsumexp of each row of the logits, in the shape of all in `aligned`."""
    lse = _peeled(value.inputs[0]) if value.op == "square" else value
    if value is lse or lse.op != "logsumexp" or lse.attrs != ((-1,), False) or value.meta is None:
        return False
    same_shape = all(v.meta is not None and v.meta.shape == value.meta.shape for v in aligned)
    return same_shape and _rows_of(lse.inputs[0]).number == _rows_of(logits).number


def _peeled(value: Value) -> Value:
    """Without casts, copies, and reshapes of one number."""
    while value.op in TRANSPARENT or (value.op == "reshape" and value.meta is not None and not value.meta.ndim):
        value = value.inputs[0]
    return value


def _factors(value: Value) -> tuple[float, list[Value]]:
    """(number, factors) that a product consists of."""
    value = _peeled(value)
    if value.op == "const":
        return float(value.const), []
    if value.op != "mul":
        return 1.0, [value]
    (one, left), (other, right) = (_factors(v) for v in value.inputs)
    return one * other, [*left, *right]


def _rows_of(logits: Value) -> Value:
    """Logits before what keeps all rows, and all bits of them."""
    while True:
        known = logits.inputs and logits.meta is not None and logits.inputs[0].meta is not None
        widened = known and logits.op == "cast" and logits.meta.dtype.itemsize > logits.inputs[0].meta.dtype.itemsize
        regrouped = logits.op == "reshape" and is_row_operator(logits)
        if not (widened or regrouped or logits.op == "copy"):
            return logits
        logits = logits.inputs[0]


def _is_total(value: Value) -> bool:
    """A sum over all dimensions."""
    source = value.inputs[0].meta if value.op == "sum" else None
    return source is not None and len(value.attrs[0]) == source.ndim


def _is_mask(loss: Value, mask: Value, inverted: bool = False) -> bool:
    """Whether this is 1 for the rows that the loss counts and 0 for the others; inverted: the other way round."""
    while mask.op in (*TRANSPARENT, "not", "reshape"):
        mask, inverted = mask.inputs[0], inverted != (mask.op == "not")
    if mask.op != ("opaque:eq" if inverted else "opaque:ne") or mask.node is None or len(mask.node.args) != 2:
        return False
    return mask.node.args[1] == loss.attrs[1] and _targets(mask.inputs[0]).number == _targets(loss.inputs[1]).number


def _targets(target: Value) -> Value:
    while target.op in ("reshape", "copy"):
        target = target.inputs[0]
    return target


def _counts_rows(loss: Value, count: Value) -> bool:
    """Whether this is the number of rows that the loss counts; or 1 if there is none, when its mean is NaN anyway."""
    count = _peeled(count)
    if count.op == "clamp_min" and count.inputs[1].const == 1.0:
        count = _peeled(count.inputs[0])
    return _is_total(count) and _is_mask(loss, count.inputs[0])
