"""The canonical form: rules by family of ATen operators (pointwise, layout, products) in one table (table.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rewriter.canonical import complex, functions, layout, losses, pointwise, products, quantised, reductions  # noqa: F401  rules
from rewriter.canonical.table import COMMUTATIVE, RULES, TRANSPARENT, cast
from rewriter.shadow import Shadow, Value

__all__ = ["COMMUTATIVE", "TRANSPARENT", "canonical_value"]


def canonical_value(shadow: Shadow, node: fx.Node) -> Value | None:
    """The canonical value of one call node, or None where no rule applies."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        known = target._schema.name  # so that a rule for another library's operator needs no import of it
        target = known if known in RULES else target.overloadpacket
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
    inputs = tuple(cast(shadow, i, dtype) for i in value.inputs)
    return shadow.replace(value, value.op, inputs, value.attrs)


def _promoted(kinds: set[torch.dtype]) -> torch.dtype:
    result = next(iter(kinds))
    for kind in kinds:
        result = torch.promote_types(result, kind)
    return result
