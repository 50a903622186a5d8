"""What can be told of a value when a graph is compiled: masks and tables that are made of nothing but sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rewriter.meta import example

MOST_NODES, MOST_ELEMENTS = 64, 1 << 26
# Of these a mask may be made where a size changes between calls: what they compute changes only where a size passes a
# number that is written in the graph, so a few sizes on both sides of all such numbers speak for every size.
PIECEWISE_LINEAR = {
    "arange", "ones", "zeros", "full", "ones_like", "zeros_like", "full_like", "scalar_tensor", "tril", "triu", "ge",
    "gt", "le", "lt", "eq", "ne", "sub", "add", "rsub", "neg", "mul", "unsqueeze", "squeeze", "view", "reshape",
    "expand",
    "transpose", "t", "permute", "slice", "select", "to", "_to_copy", "alias", "lift_fresh", "clone", "contiguous",
    "masked_fill", "where", "logical_not", "bitwise_not", "logical_and", "bitwise_and", "logical_or", "bitwise_or",
}  # fmt: skip


def constants(node: fx.Node) -> list[torch.Tensor]:
    """The tensor that a node is in every call, since only sizes go into it; [] if there is more to it.

    Where one size changes between calls: the tensors at a few sizes that speak for all.
    """
    if "constants" not in node.meta:
        try:
            node.meta["constants"] = _constants(node)
        except Exception:  # an operator that can't run here: then it is no constant
            node.meta["constants"] = []
    return node.meta["constants"]


def _constants(node: fx.Node) -> list[torch.Tensor]:
    order: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        current = todo.pop()
        target = current.target
        if isinstance(example(current), torch.SymInt) or current in order:
            continue
        if current.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or len(order) > MOST_NODES:
            return []
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            return []
        order[current] = None
        todo.extend(current.all_input_nodes)
    sizes = {n: example(n).node.expr for c in order for n in c.all_input_nodes if isinstance(example(n), torch.SymInt)}
    symbols = set().union(*(expr.free_symbols for expr in sizes.values()))
    position = {n: i for i, n in enumerate(node.graph.nodes)}
    nodes = sorted(order, key=position.__getitem__)
    if not symbols:
        return [_evaluate(nodes, {n: int(expr) for n, expr in sizes.items()})]
    if len(symbols) > 1 or not all(n.target._schema.name.removeprefix("aten::") in PIECEWISE_LINEAR for n in nodes):
        return []
    largest = max((abs(x) for n in nodes for x in pytree.tree_leaves((n.args, n.kwargs)) if _is_edge(x)), default=0)
    trials = [2, 3, 5, 2 * math.ceil(largest) + 3]
    (symbol,) = symbols
    return [_evaluate(nodes, {n: int(expr.subs(symbol, size)) for n, expr in sizes.items()}) for size in trials]


def _is_edge(number: Any) -> bool:
    """Whether a number may be one that a size is compared with: not one that fills a mask, or the end of all."""
    return type(number) in (int, float) and math.isfinite(number) and abs(number) < 2**31


def _evaluate(nodes: list[fx.Node], values: dict[fx.Node, Any]) -> torch.Tensor:
    values = dict(values)
    with torch.no_grad():
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if "device" in kwargs:
                kwargs = {**kwargs, "device": "cpu"}
            values[node] = node.target(*args, **kwargs)
            if values[node].numel() > MOST_ELEMENTS:
                raise ValueError("too large to look at")
    return values[nodes[-1]]
