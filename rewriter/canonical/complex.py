"""Canonical form of complex numbers: pairs of real values, so that a complex rotation reads as the real one."""

from __future__ import annotations

from typing import Any

from torch import fx

from rewriter.canonical.layout import part_of_pairs
from rewriter.canonical.table import aten, rule
from rewriter.meta import tensor_meta
from rewriter.shadow import Shadow, Value


@rule(aten.view_as_complex)
def _view_as_complex(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    parts = [part_of_pairs(shadow, args[0], i) for i in (0, 1)]
    return None if None in parts else shadow.add("complex", tuple(parts), (), node)


@rule(aten.complex)
def _complex(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    return shadow.add("complex", tuple(args[:2]), (), node)


@rule(aten.view_as_real)
def _view_as_real(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    if args[0].op != "complex" or tensor_meta(node) is None:
        return None
    return shadow.add("stack", args[0].inputs, (-1,), node)
