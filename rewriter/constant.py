"""What can be told of a value when a graph is compiled: masks and tables that are made of nothing but sizes."""

from __future__ import annotations

import torch
from torch import fx

from rewriter.meta import example


def constant(node: fx.Node, limit: int = 64) -> torch.Tensor | None:
    """The tensor that a node is in every call, since only sizes go into it; None if there is more to it."""
    value = example(node)
    if (
        not isinstance(value, torch.Tensor)
        or any(not isinstance(s, int) for s in value.shape)
        or value.numel() > 1 << 26
    ):
        return None
    order, todo = [], [node]
    while todo:
        current = todo.pop()
        target = current.target
        if current.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or len(order) > limit:
            return None
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            return None
        order.append(current)
        todo.extend(current.all_input_nodes)
    values: dict[fx.Node, torch.Tensor] = {}
    position = {n: i for i, n in enumerate(node.graph.nodes)}
    try:
        with torch.no_grad():
            for current in sorted(set(order), key=position.__getitem__):
                args, kwargs = fx.node.map_arg((current.args, current.kwargs), values.__getitem__)
                if "device" in kwargs:
                    kwargs = {**kwargs, "device": "cpu"}
                values[current] = current.target(*args, **kwargs)
    except Exception:  # an operator that can't run here: then the mask stays what it is
        return None
    return values[node]
