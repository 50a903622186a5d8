"""How a graph makes logits: a product with a weight, maybe a bias and low-rank adapters, scaled, capped and cast.

    steps(x W^T + b + sum_i s_i (x A_i^T) B_i^T)

Read from the result back to x, on real nodes; what is not one of these is no head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

aten = torch.ops.aten
PRODUCTS = (aten.linear.default, aten.matmul.default)
SCALINGS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
CASTS = (aten.to.dtype, aten._to_copy.default)
TURNS = {aten.t.default: ((),), aten.numpy_T.default: ((),), aten.transpose.int: ((0, 1), (1, 0), (-1, -2), (-2, -1)),
          aten.permute.default: (([1, 0],),)}  # fmt: skip


@dataclass(frozen=True)
class Product:
    """x times a weight [N, K], or with `by_columns` [K, N], maybe with a bias. nodes: what computes it."""

    x: fx.Node
    weight: fx.Node
    by_columns: bool
    bias: fx.Node | None
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Branch:
    """An adapter: `scale * product(first, up)`, where `first` is what its first matrix gives, scaled by a number."""

    first: fx.Node
    up: fx.Node
    by_columns: bool
    scale: float
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]


@dataclass(frozen=True)
class HeadGraph:
    """steps: from the sum to the result. nodes: what computes all of it, last one first. inputs: x, then parameters."""

    product: Product
    branches: tuple[Branch, ...]
    steps: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]


def head_graph(result: fx.Node, is_parameter: Callable[[object, int], bool]) -> HeadGraph | None:
    """What makes a result, if that is a head's; `is_parameter(node, dims)` tells weights and biases.

    Nothing in it but the result is read by anything else.
    """
    node, steps, sums, terms = result, [], [], []
    while _is_step(node):
        steps.append(node)
        node = node.args[0]
    while _is_sum(node) and _product(node, is_parameter) is None:
        for base, other in (node.args, node.args[::-1]):
            if (branch := _branch(other, is_parameter)) is not None and isinstance(base, fx.Node):
                break
        else:
            return None
        sums.append(node)
        terms.append((branch, other))
        node = base
        while terms and _is_cast(node):
            sums.append(node)
            node = node.args[0]
    product = _product(node, is_parameter)
    if product is None:
        return None
    branches = [branch for branch, _ in reversed(terms)]
    if any(_before_casts(branch.inputs[0])[0] is not product.x for branch in branches):
        return None
    casts = tuple(c for branch in branches for c in _before_casts(branch.inputs[0])[1])
    nodes = (*steps, *sums, *(n for b in branches for n in b.nodes), *casts, *product.nodes)
    if any(len(n.users) > 1 for n in nodes if n is not result):
        return None
    biases = () if product.bias is None else (product.bias,)
    inputs = (product.x, product.weight, *biases, *(n for b in branches for n in b.inputs[1:]))
    return HeadGraph(product, tuple(branches), tuple(reversed(steps)), nodes, inputs)


def _product(node: fx.Node, is_parameter: Callable[[object, int], bool]) -> Product | None:
    nodes, added = [], None
    if _is_sum(node) and is_parameter(node.args[1], 1):
        nodes.append(node)
        node, added = node.args
    if not isinstance(node, fx.Node) or node.target not in PRODUCTS or node.kwargs or len(node.args) < 2:
        return None
    nodes.append(node)
    x, weight, *own = node.args
    by_columns = node.target is aten.matmul.default
    if by_columns and isinstance(weight, fx.Node) and weight.target in TURNS:
        if tuple(weight.args[1:]) not in TURNS[weight.target] or weight.kwargs:
            return None
        nodes.append(weight)
        weight, by_columns = weight.args[0], False
    biases = [b for b in (*own, added) if b is not None]
    if len(biases) > 1 or not all(is_parameter(b, 1) for b in biases) or not is_parameter(weight, 2):
        return None
    if not isinstance(x, fx.Node):
        return None
    return Product(x, weight, by_columns, biases[0] if biases else None, tuple(nodes))


def _branch(node: object, is_parameter: Callable[[object, int], bool]) -> Branch | None:
    node, after, scale = _unscaled(node)
    second = None if node is None else _product(node, is_parameter)
    if second is None or second.bias is not None:
        return None
    node, between, _ = _unscaled(second.x)
    first = None if node is None else _product(node, is_parameter)
    if first is None or first.bias is not None:
        return None
    nodes = (*after, *second.nodes, *between, *first.nodes)
    return Branch(second.x, second.weight, second.by_columns, scale, nodes, (first.x, first.weight, second.weight))


def _unscaled(node: object) -> tuple[fx.Node | None, tuple[fx.Node, ...], float]:
    """(what is scaled by numbers and cast, the nodes that do it, last one first, product of the numbers)."""
    nodes, scale = [], 1.0
    while isinstance(node, fx.Node) and (_is_cast(node) or is_scaling(node)):
        if is_scaling(node):
            scale *= factor_of(node)
        nodes.append(node)
        node = node.args[0]
    return (node if isinstance(node, fx.Node) else None), tuple(nodes), scale


def _before_casts(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    casts = []
    while _is_cast(node) and isinstance(node.args[0], fx.Node):
        casts.append(node)
        node = node.args[0]
    return node, tuple(casts)


def is_scaling(node: fx.Node) -> bool:
    if node.target not in SCALINGS or node.kwargs or len(node.args) != 2:
        return False
    return type(node.args[1]) in (int, float) and node.args[1] != 0


def factor_of(scaling: fx.Node) -> float:
    number = scaling.args[1]
    return 1 / number if scaling.target in (aten.div.Tensor, aten.div.Scalar) else number


def _is_cast(node: object) -> bool:
    if not isinstance(node, fx.Node) or not node.args:
        return False
    if node.target is aten.to.dtype:
        return not node.kwargs and len(node.args) == 2
    return node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"} and len(node.args) == 1


def _is_step(node: object) -> bool:
    """What may be done to logits on their way out."""
    return isinstance(node, fx.Node) and (node.target is aten.tanh.default or is_scaling(node) or _is_cast(node))


def _is_sum(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.add.Tensor and not node.kwargs and len(node.args) == 2
