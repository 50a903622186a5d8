"""Canonical form of an `autograd.Function` around operators of weights in 4 bits: what its forward computes.

Of others it is not looked at: somebody wrote a backward of their own for them, as we would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._functorch.autograd_function import autograd_function_apply

from rewriter.canonical.quantised import OPERATORS
from rewriter.canonical.table import rule
from rewriter.shadow import Shadow, Value, canonical_or_opaque


@rule(autograd_function_apply)
def _autograd_function(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    forward = node.meta.get("forward")
    if forward is None or not any(_name(inner) in OPERATORS for inner in forward.graph.nodes):
        return None
    made = len(shadow.values)
    for hole, operand in zip(forward.graph.find_nodes(op="placeholder"), node.args[2:], strict=True):
        if not isinstance(operand, fx.Node):
            return None
        shadow.of[hole] = shadow.of[operand]
    for inner in forward.graph.nodes:
        if inner.op == "call_function":
            shadow.of[inner] = canonical_or_opaque(shadow, inner)
    for value in shadow.values[made:]:
        value.node = None  # a node of another graph
    results = forward.graph.find_nodes(op="output")[0].args[0]
    if isinstance(results, fx.Node):
        result = shadow.of[results]
        if not any(value is result for value in shadow.values[made:]):  # one of its operands
            return None
        return shadow.add(result.op, result.inputs, result.attrs, node, unique=result.op.startswith("opaque:"))
    return shadow.add("results", tuple(shadow.of[result] for result in results), (), node)


def _name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
