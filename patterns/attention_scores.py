"""From the argument of attention's softmax back to the product of queries and keys: which steps a model takes between.

A step is ("scale", number), ("multiply" | "divide", tensor), ("cap", softcap), ("add" | "subtract", tensor),
("keep" | "drop", condition, fill), ("floor", number). kernels/sdpa.py takes them again, in the order in which the model
does. A cap `c * tanh(a * z)` is a scaling by a * c, then the cap `c * tanh(z / c)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from rewriter.canonical import TRANSPARENT
from rewriter.shadow import Value, is_row_operator

HIDDEN = -1e4  # of a score that is at most this beside another that is not, nothing is left after the softmax
SCALINGS, MASKS = ("scale", "multiply", "divide"), ("add", "subtract", "keep", "drop")
LONGEST = 12  # operators between the product and the softmax
ZEROS = {torch.ops.aten.zeros.default, torch.ops.aten.zeros_like.default, torch.ops.aten.new_zeros.default}


@dataclass(frozen=True)
class Step:
    """kind: see above. value: its tensor, if it has one. number: its number. ndim: dimensions of the scores there."""

    kind: str
    value: Value | None
    number: float | None
    ndim: int


@dataclass(frozen=True)
class Scores:
    """product: the "matmul" or "linear" of queries and keys. steps: in the model's order. batches: leading dimensions
    that the scores had on the way, where they were regrouped."""

    product: Value
    steps: tuple[Step, ...] = ()
    batches: frozenset[tuple[int, ...]] = frozenset()

    def then(self, kind: str, at: Value, value: Value | None = None, number: float | None = None) -> Scores:
        before = {step.kind for step in self.steps}
        if kind in SCALINGS and "cap" in before:
            raise Stray("scores are scaled after they are capped", at)
        if kind != "scale" and "floor" in before:
            raise Stray("more is done to scores after they are raised to a smallest", at)
        return replace(self, steps=(*self.steps, Step(kind, value, number, at.meta.ndim if at.meta else 0)))


class Stray(Exception):
    """Where the way back ends at something that no step is: a reason, and the value it speaks of."""

    def __init__(self, reason: str, at: Value):
        super().__init__(reason)
        self.at = at


def trace_back(value: Value, left: int = LONGEST) -> Scores:
    """The scores that `value` is; raises Stray."""
    if left == 0:
        raise Stray("too many operators stand between the scores and their softmax", value)
    if value.op == "matmul" or (value.op == "linear" and len(value.inputs) == 2):
        return Scores(value)
    if value.op in TRANSPARENT:
        return trace_back(value.inputs[0], left)
    if value.op == "reshape" and is_row_operator(value):
        scores = trace_back(value.inputs[0], left)
        return replace(scores, batches=scores.batches | {m.shape[:-2] for m in (value.meta, value.inputs[0].meta)})
    failure = None
    for make in _ways(value, left - 1):
        try:
            return make()
        except Stray as stray:
            failure = failure or stray
    raise failure or Stray(f"scores come from {value.op.removeprefix('opaque:')}", value)


def _ways(value: Value, left: int) -> Iterator:
    """What `value` can be as a step after other scores."""
    op, inputs = value.op, value.inputs
    if op == "mul":
        for a, b in (inputs, inputs[::-1]):
            if b.op == "const":
                yield lambda a=a, b=b: _scaled(value, a, b.const, left)
            elif b.op == "reciprocal" and (divisor := real(b.inputs[0])) is not None:
                yield lambda a=a, b=divisor: trace_back(a, left).then("divide", value, b)
            elif (factor := real(b)) is not None:
                yield lambda a=a, b=factor: trace_back(a, left).then("multiply", value, b)
    elif op == "add":
        for a, b in (inputs, inputs[::-1]):
            if b.op == "const":
                yield lambda a=a: trace_back(a, left)  # softmax doesn't see it
            elif b.node is not None and b.node.target in ZEROS:
                yield lambda a=a: trace_back(a, left)
            elif (bias := real(b)) is not None:
                yield lambda a=a, b=bias: trace_back(a, left).then("add", value, b)
    elif op == "sub" and (bias := real(inputs[1])) is not None:
        yield lambda: trace_back(inputs[0], left).then("subtract", value, bias)
    elif op == "where" and real(inputs[0]) is not None:
        for kind, scores, fill in (("keep", *inputs[1:]), ("drop", *inputs[:0:-1])):
            if fill.op == "const":
                yield lambda k=kind, s=scores, f=fill.const: _filled(value, k, s, real(inputs[0]), f, left)
    elif op == "clamp_min" and inputs[1].op == "const":  # keeps a mask from being infinite
        yield lambda: trace_back(inputs[0], left).then("floor", value, number=inputs[1].const)


def _scaled(value: Value, inside: Value, number: float, left: int) -> Scores:
    while inside.op in TRANSPARENT:
        inside = inside.inputs[0]
    if inside.op != "tanh":
        return trace_back(inside, left).then("scale", value, number=number)
    scores = trace_back(inside.inputs[0], left)
    if any(step.kind not in SCALINGS for step in scores.steps):
        raise Stray("scores are capped after they are masked", value)
    return scores.then("scale", value, number=number).then("cap", value, number=number)


def _filled(value: Value, kind: str, scores: Value, condition: Value, fill: float, left: int) -> Scores:
    if value.meta is not None and value.meta.dtype.is_floating_point:
        fill = torch.tensor(fill, dtype=torch.float64).to(value.meta.dtype).item()
    return trace_back(scores, left).then(kind, value, condition, fill)


def real(value: Value) -> Value | None:
    """The value as one that a node computes, without casts that only the shadow has."""
    while value.op == "cast" and value.node is None:
        value = value.inputs[0]
    return value if value.node is not None and value.meta is not None else None
