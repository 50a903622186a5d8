"""The canonical shadow: a graph in one normal form, whose values point back at the real nodes.

The real graph is never touched, so rules here may change the last bit (`x / sqrt(y)` becomes `x * rsqrt(y)`): they only
serve recognition. What a rewrite really computes is decided by legality and verification on the real nodes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx

from rewriter.meta import TensorMeta, tensor_meta


class Value:
    """One value of the shadow: a canonical operator on other values, or an input, constant or opaque node.

    op:     canonical name ("mul", "cast", "linear" ...); "input", "const", or "opaque:<target>"
    inputs: operand values
    attrs:  hashable constants of the operator, in canonical form
    node:   the real node that computes this very value; None for a value that exists in the shadow only
    number: values with equal numbers are equal by construction (value numbering; casts and copies count)
    """

    __slots__ = ("attrs", "inputs", "meta", "node", "number", "op", "users")

    def __init__(self, op: str, inputs: tuple[Value, ...], attrs: tuple, node: fx.Node | None, meta: TensorMeta | None):
        self.op, self.inputs, self.attrs, self.node, self.meta = op, inputs, attrs, node, meta
        self.users: list[Value] = []
        self.number = -1

    @property
    def const(self) -> Any:
        return self.attrs[0] if self.op == "const" else None

    def __repr__(self) -> str:
        return f"{self.op}{list(self.attrs) if self.attrs else ''}" + (f"@{self.node}" if self.node else "")


class Shadow:
    """Values of a whole graph, indexed by operator and by real node."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.by_op: dict[str, list[Value]] = defaultdict(list)
        self.of: dict[fx.Node, Value] = {}
        self._numbers: dict[Any, int] = {}
        self._consts: dict[Any, Value] = {}

    def add(
        self,
        op: str,
        inputs: tuple[Value, ...] = (),
        attrs: tuple = (),
        node: fx.Node | None = None,
        meta: TensorMeta | None = None,
        unique: bool = False,
    ) -> Value:
        """A new value; `unique` keeps its number apart from every other (inputs, random or opaque operators)."""
        known = tensor_meta(node) if node is not None else None  # what the real node says goes before what a rule says
        value = Value(op, inputs, attrs, node, meta if known is None else known)
        for operand in inputs:
            operand.users.append(value)
        if op == "copy":
            value.number = inputs[0].number
        else:
            key = (object(),) if unique else (op, attrs, *(i.number for i in inputs))
            value.number = self._numbers.setdefault(key, len(self._numbers))
        self.values.append(value)
        self.by_op[op].append(value)
        return value

    def replace(self, value: Value, op: str, inputs: tuple[Value, ...], attrs: tuple = ()) -> Value:
        """Another word for a value that was just added and that nothing uses yet."""
        for operand in value.inputs:
            operand.users.remove(value)
        self.values.remove(value)
        self.by_op[value.op].remove(value)
        return self.add(op, inputs, attrs, value.node, value.meta)

    def const(self, number: Any) -> Value:
        key = (type(number), number)
        if key not in self._consts:
            self._consts[key] = self.add("const", attrs=(number,))
        return self._consts[key]


def is_row_operator(value: Value) -> bool:
    """A slice or reshape that leaves the rows along the last dimension whole."""
    source = value.inputs[0].meta if value.inputs else None
    if source is None or value.meta is None or not source.ndim or not value.meta.ndim:
        return False
    if value.op == "slice":
        return value.attrs[0] != -1
    return value.op == "reshape" and source.shape[-1] == value.meta.shape[-1] and source.static[-1]


def zeroed_in_part(value: Value) -> Value | None:
    """What `value` is a part of, the rest being 0: the operand of a dropout, or of a selection against 0."""
    if value.op == "dropout":
        return value.inputs[0]
    if value.op == "where":
        _, a, b = value.inputs
        return a if b.const == 0 else b if a.const == 0 else None
    return None


def build_shadow(graph: fx.Graph, unstable: frozenset[fx.Node] = frozenset()) -> Shadow:
    """The shadow of an ATen graph. `unstable`: nodes whose value changes in place; they are never shared."""
    shadow = Shadow()
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            value = shadow.add("input", node=node, unique=True)
        elif node in unstable:
            value = opaque(shadow, node)
        else:
            value = canonical_or_opaque(shadow, node)
        shadow.of[node] = value
    return shadow


def canonical_or_opaque(shadow: Shadow, node: fx.Node) -> Value:
    from rewriter.canonical import canonical_value

    return canonical_value(shadow, node) or opaque(shadow, node)


def opaque(shadow: Shadow, node: fx.Node) -> Value:
    """A node the canonical form has no word for: known by its target, never equal to another node."""
    inputs = tuple(shadow.of[n] for n in node.all_input_nodes if n in shadow.of)
    return shadow.add(f"opaque:{target_name(node)}", inputs, node=node, unique=True)


def target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::")
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
