"""Logits that a model returns without a loss: a head at the end of its forward, to be computed on demand.

The loss is then the caller's: one that looks at rows (a cross entropy, log-probabilities, an accuracy) never holds all
logits, as if the model had computed it. Structure only: a linear layer, maybe with a bias, scaled and capped by numbers
and cast, that nothing but the caller reads, and whose rows are at least `LONG` times as long as the rows it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from rewriter.legality import PLAIN, written_nodes
from rewriter.meta import example, tensor_meta
from rewriter.replace import Promise
from rewriter.subgraph import extract

# What is kept in place of a row of logits is the row that goes in, and a loss of them needs a gradient of each: below
# twice its length, keeping the one instead of the other saves less than half, and a few classes are not worth it.
LONG = 2

aten = torch.ops.aten
SCALINGS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
CASTS = (aten.to.dtype, aten._to_copy.default)
TURNS = {aten.t.default: ((),), aten.numpy_T.default: ((),), aten.transpose.int: ((0, 1), (1, 0), (-1, -2), (-2, -1)),
          aten.permute.default: (([1, 0],),)}  # fmt: skip


@dataclass(frozen=True)
class Logits:
    """A result that is computed on demand from now on, and the numbers of its rows: for the report.

    nodes: what computes it, the result last; classes and width: lengths of its rows and of those that go in
    """

    promise: Promise
    nodes: tuple[fx.Node, ...]
    classes: int
    width: int


def find_logits(graph: fx.Graph, leaves: Callable[[fx.Node], bool], taken: set[fx.Node]) -> Iterator[Logits]:
    """The heads of a graph, without the nodes that are `taken`; `leaves(node)`: whether the forward ends here."""
    (output,) = graph.find_nodes(op="output")
    results = [r for r in output.args[0] if isinstance(r, fx.Node)]
    candidates = [r for r in results if results.count(r) == 1 and list(r.users) == [output]]
    written = None
    for result in candidates:
        found = _head(result)
        if found is None or not leaves(found.linear):
            continue
        written = written_nodes(graph) if written is None else written
        if not (set(found.nodes) | {found.x}) & taken and not any(n in written for n in (*found.nodes, *found.inputs)):
            promise = Promise(result, found.inputs, extract(found.inputs, found.nodes, (result,)), 0)
            yield Logits(promise, found.nodes, tensor_meta(result).shape[-1], tensor_meta(found.x).shape[-1])


@dataclass(frozen=True)
class _Head:
    x: fx.Node
    linear: fx.Node
    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


def _head(result: fx.Node) -> _Head | None:
    """How a graph's output is a head's logits, if it is."""
    nodes: list[fx.Node] = []
    node, bias = result, None
    while node.target not in (aten.linear.default, aten.matmul.default):
        if node.op != "call_function" or not node.args or (nodes and len(node.users) > 1):
            return None
        nodes.append(node)
        if node.target is aten.add.Tensor and bias is None and not node.kwargs:
            node, bias = node.args
            if not _is_parameter(bias, 1) or not isinstance(node, fx.Node) or node.target not in PRODUCTS:
                return None
        elif _is_step(node):
            node = node.args[0]
        else:
            return None
    if nodes and len(node.users) > 1:
        return None
    nodes.append(node)
    if node.kwargs or len(node.args) < 2:
        return None
    x, weight, *own = node.args
    if node.target is aten.matmul.default and isinstance(weight, fx.Node) and weight.target in TURNS:
        if tuple(weight.args[1:]) not in TURNS[weight.target] or weight.kwargs:
            return None
        nodes.append(weight)
        weight = weight.args[0]
    biases = [b for b in (*own, bias) if b is not None]
    if len(biases) > 1 or not all(_is_parameter(b, 1) for b in biases) or not _is_parameter(weight, 2):
        return None
    inputs = (x, weight, *biases)
    if len(set(inputs)) < len(inputs) or not _fits(result, x, weight, (*nodes, *inputs)):
        return None
    if len({n.meta.get("ambient") for n in nodes}) > 1:
        return None
    return _Head(x, node, inputs, tuple(reversed(nodes)))


PRODUCTS = (aten.linear.default, aten.matmul.default)


def _is_parameter(node: object, dims: int) -> bool:
    """Whether it comes into the graph from outside: it is there as long as somebody may ask."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return False
    meta = tensor_meta(node)
    return meta is not None and meta.ndim == dims and all(meta.static)


def _is_step(node: fx.Node) -> bool:
    """What may be done to logits on their way out."""
    if node.target is aten.tanh.default:
        return True
    if node.target in SCALINGS:
        return not node.kwargs and len(node.args) == 2 and type(node.args[1]) in (int, float)
    if node.target is aten.to.dtype:
        return not node.kwargs and len(node.args) == 2
    return node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"} and len(node.args) == 1


def _fits(result: fx.Node, x: object, weight: fx.Node, everything: tuple) -> bool:
    """Whether sizes, dtypes and kinds of tensors are as expected, and the rows long enough."""
    metas = [tensor_meta(n) if isinstance(n, fx.Node) else None for n in everything]
    if any(m is None or not m.dtype.is_floating_point for m in metas):
        return False
    if any(type(example(n)) not in PLAIN for n in everything) or len({m.device for m in metas}) > 1:
        return False
    z, row = tensor_meta(result), tensor_meta(x)
    long = row.ndim >= 2 and z.static[-1] and row.static[-1] and z.shape[-1] >= LONG * row.shape[-1]
    return long and z.is_contiguous() and z.shape[-1] in tensor_meta(weight).shape
