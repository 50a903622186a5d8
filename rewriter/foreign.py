"""Tails that somebody else has fused: an opaque call that takes hidden states, a head and labels and gives the loss.

Found by what goes in and comes out alone: rows [..., D], a weight [V, D] or [D, V], an integer for each row, and as the
first result one number or one for each row. The call is an `autograd.Function` or an operator of another library.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx

from rewriter.meta import example, hint

OWN = ("aten", "prims", "prim", "rewriter", "higher_order")


def fused_tails(graph: fx.Graph) -> list[tuple[fx.Node, str]]:
    """(node, what the report says) of each such tail in a graph."""
    tails = []
    for node in graph.nodes:
        with contextlib.suppress(ValueError):  # a size depends on data
            if (words := _words(node)) is not None and _is_tail(node):
                tails.append((node, words))
    return tails


def _words(node: fx.Node) -> str | None:
    """What to say of a call of which nothing is known inside."""
    target = node.target
    if node.op != "call_function":
        return None
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "already fused by an autograd.Function" if target.name() == "autograd_function_apply" else None
    if isinstance(target, torch._ops.OpOverload):
        return None if target.namespace in OWN else f"already fused by {target.namespace}::{target._opname}"
    return None


def _is_tail(node: fx.Node) -> bool:
    given = [t for n in node.all_input_nodes if isinstance(t := example(n), torch.Tensor)]
    results = [t for t in _flat(example(node)) if isinstance(t, torch.Tensor)]
    if not results or not results[0].is_floating_point():
        return False
    floats = [t for t in given if t.is_floating_point()]
    for labels in (t for t in given if not t.is_floating_point() and not t.is_complex() and t.dtype is not torch.bool):
        count = _count(labels)
        if _count(results[0]) not in (1, count):
            continue
        for weight in (t for t in floats if t.dim() == 2):
            rows = [t for t in floats if t is not weight and t.dim() >= 2 and _count(t) == count * hint(t.shape[-1])]
            if any(hint(t.shape[-1]) in map(hint, weight.shape) for t in rows):
                return True
    return False


def _count(tensor: torch.Tensor) -> int:
    return hint(tensor.numel())


def _flat(value: Any) -> list:
    return list(value) if isinstance(value, tuple | list) else [value]
