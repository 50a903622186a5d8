"""What can be told of a value when a graph is compiled: masks and tables that are made of nothing but sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from rewriter.meta import example

MOST_NODES, MOST_ELEMENTS = 64, 1 << 26
# Where a size changes between calls, a mask may be made of positions (whole numbers), sums and differences of them,
# comparisons, triangles and selections. What it shows then changes only where the size passes a sum of the numbers that
# are written in the graph, so a few sizes on both sides of all such sums speak for every size. The arguments named here
# are not such numbers: they are what is filled in.
POSITIONS = {"arange": (), "tril": (), "triu": (), "sub": (), "add": (), "rsub": ()}
COMPARISONS = dict.fromkeys(("ge", "gt", "le", "lt", "eq", "ne"), ())
FILLS = {
    "ones": (), "zeros": (), "ones_like": (), "zeros_like": (), "full": (1,), "full_like": (1,), "scalar_tensor": (0,),
    "masked_fill": (2,), "where": (1, 2), "logical_not": (), "bitwise_not": (), "logical_and": (), "bitwise_and": (),
    "logical_or": (), "bitwise_or": (),
}  # fmt: skip
LAYOUT = dict.fromkeys(
    ("unsqueeze", "squeeze", "view", "reshape", "expand", "transpose", "t", "permute", "alias"), None
)
KNOWN = POSITIONS | COMPARISONS | FILLS | LAYOUT


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
    if len(symbols) > 1 or not all(map(_is_known, nodes)):
        return []
    (symbol,) = symbols
    if any(expr != symbol and not expr.is_number for expr in sizes.values()):
        return []  # a size that was computed: its numbers are not to be seen here
    largest = 2 * math.ceil(sum(number for n in nodes for number in _edges(n))) + 3
    if largest**2 > MOST_ELEMENTS:
        return []
    return [
        _evaluate(nodes, {n: size if expr == symbol else int(expr) for n, expr in sizes.items()})
        for size in (2, 3, 5, largest)
    ]


def _is_known(node: fx.Node) -> bool:
    """Whether an operator is one of those that a mask for every size may be made of."""
    name, value = node.target._schema.name.removeprefix("aten::"), example(node)
    if name in ("to", "_to_copy"):
        before = example(node.args[0])
        return torch.bool in (before.dtype, value.dtype)
    if name in POSITIONS and value.dtype not in (torch.int64, torch.bool):
        return name in ("tril", "triu")  # of numbers that are filled in
    return name in KNOWN


def _edges(node: fx.Node) -> list[float]:
    """The numbers of an operator that positions are moved by or compared with."""
    name = node.target._schema.name.removeprefix("aten::")
    fills = KNOWN.get(name)
    if fills is None:
        return []
    given = [*(a for i, a in enumerate(node.args) if i not in fills), *node.kwargs.values()]
    return [abs(a) for a in given if _is_number(a)]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


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
