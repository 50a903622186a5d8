"""The table of rules, and what rules share.

A rule takes (shadow, node, operands) and gives the canonical value of the node; None leaves the node opaque. Operands
are values for tensors and constants alike, so commutative operators need no special case for scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from rewriter.meta import TensorMeta
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


def operand(shadow: Shadow, given: Any) -> Value | None:
    """A tensor or number as a value; None for anything else (a symbolic size, say).

    Pointwise operators broadcast their operands, so an expansion before them says nothing.
    """
    if isinstance(given, Value):
        while given.op == "expand":
            given = given.inputs[0]
        return given
    if isinstance(given, bool | int | float):
        return shadow.const(float(given))
    return None


def cast(shadow: Shadow, value: Value, dtype: torch.dtype) -> Value:
    meta = value.meta
    if meta is None or meta.dtype == dtype or not meta.dtype.is_floating_point:
        return value
    changed = TensorMeta(meta.shape, meta.stride, dtype, meta.device, meta.requires_grad, meta.static)
    return shadow.add("cast", (value,), (dtype,), meta=changed)


def negative(dim: int, ndim: int) -> int:
    return dim - ndim if dim >= 0 else dim
