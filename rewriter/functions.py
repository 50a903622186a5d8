"""An `autograd.Function` in a graph: what its forward computes, as a graph that can be read and run like any other.

The call itself stays one node, as its backward is somebody's own. A pattern may replace it all the same: verification
finds out whether its backward is the derivative of its forward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rewriter.log import log
from rewriter.meta import draws_random_numbers, example
from rewriter.normalise import normalise

_NO_OPERATORS = {torch._C._set_grad_enabled}


def forward_of(lower: Callable[[fx.GraphModule], fx.GraphModule], gm: fx.GraphModule, node: fx.Node) -> Any:
    """A GraphModule of the call's operands that gives its result, or a tuple of its results; made of operators alone.

    None where the forward does anything else, draws random numbers or writes in place.
    """
    try:
        body = lower(getattr(gm, node.args[0].target))
        normalise(body.graph)
        return _pure(body, len(node.args) - 2)
    except Exception as error:  # whatever it is, it runs as it was captured
        log.debug("not read: %s (%s: %s)", node.name, type(error).__name__, error)
        return None


def _pure(body: fx.GraphModule, operands: int) -> fx.GraphModule | None:
    graph, new = fx.Graph(), {}
    placeholders = body.graph.find_nodes(op="placeholder")
    results, _saved = body.graph.find_nodes(op="output")[0].args[0]
    needed = _needed(results)
    for node in placeholders[len(placeholders) - operands :]:  # before them, torch 2.11 has one for the context
        new[node] = graph.node_copy(node)
    for node in body.graph.nodes:
        if node.op == "placeholder" or node.op == "output" or node.target in _NO_OPERATORS:
            continue
        if not (_is_pure(node) or _is_of_sizes(node)):
            return None
        if node in needed:  # torch 2.11 gives what was asked about sizes back beside the result
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(fx.node.map_arg(results, new.__getitem__))
    return fx.GraphModule(body, graph)


def _needed(results: Any) -> set[fx.Node]:
    """What the results are made of."""
    found, todo = set(), [n for n in pytree.tree_leaves(results) if isinstance(n, fx.Node)]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function" or draws_random_numbers(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return node.target is operator.getitem


def _is_of_sizes(node: fx.Node) -> bool:
    """Arithmetic with sizes: what a forward asked about its inputs."""
    return node.op == "call_function" and not any(isinstance(example(n), torch.Tensor) for n in node.all_input_nodes)
