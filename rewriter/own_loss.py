"""Logits that a model returns without a loss: a head at the end of its forward, to be computed on demand.

The loss is then the caller's: one that looks at rows (a cross entropy, log-probabilities, an accuracy) never holds all
logits, as if the model had computed it. Structure only: a linear layer, maybe with a bias and low-rank adapters, scaled
and capped by numbers and cast, that nothing but the caller reads, and whose rows are at least `LONG` times as long as
the rows it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from rewriter.head_graph import PRODUCTS, HeadGraph, head_graph
from rewriter.legality import PLAIN, written_nodes
from rewriter.meta import example, tensor_meta
from rewriter.replace import Promise
from rewriter.subgraph import extract

# What is kept in place of a row of logits is the row that goes in, and a loss of them needs a gradient of each: below
# twice its length, keeping the one instead of the other saves less than half, and a few classes are not worth it.
LONG = 2


@dataclass(frozen=True)
class Logits:
    """A result that is computed on demand from now on, and the numbers of its rows: for the report.

    nodes: what computes it, the result last; classes and width: lengths of its rows and of those that go in
    """

    promise: Promise
    nodes: tuple[fx.Node, ...]
    classes: int
    width: int


def find_logits(graph: fx.Graph, leaves: Callable[[fx.Node], bool]) -> Iterator[Logits]:
    """The heads of a graph; `leaves(node)`: whether the forward ends here."""
    (output,) = graph.find_nodes(op="output")
    results = [r for r in output.args[0] if isinstance(r, fx.Node)]
    candidates = [r for r in results if results.count(r) == 1 and list(r.users) == [output]]
    written = None
    for result in candidates:
        found = _head(result)
        if found is None or not leaves(next(n for n in found.product.nodes if n.target in PRODUCTS)):
            continue
        written = written_nodes(graph) if written is None else written
        if not any(n in written for n in (*found.nodes, *found.inputs)):
            order = {node: i for i, node in enumerate(graph.nodes)}
            nodes = tuple(sorted(found.nodes, key=order.__getitem__))
            promise = Promise(result, found.inputs, extract(found.inputs, nodes, (result,)), 0)
            width = tensor_meta(found.product.x).shape[-1]
            yield Logits(promise, nodes, tensor_meta(result).shape[-1], width)


def _head(result: fx.Node) -> HeadGraph | None:
    """How a graph's output is a head's logits, if it is."""
    head = head_graph(result, _is_parameter)
    if head is None or len(set(head.inputs)) < len(head.inputs):
        return None
    if not _fits(result, head.product.x, head.product.weight, (*head.nodes, *head.inputs)):
        return None
    return None if len({n.meta.get("ambient") for n in head.nodes}) > 1 else head


def _is_parameter(node: object, dims: int) -> bool:
    """Whether it comes into the graph from outside: it is there as long as somebody may ask."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return False
    meta = tensor_meta(node)
    return meta is not None and meta.ndim == dims and all(meta.static)


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
