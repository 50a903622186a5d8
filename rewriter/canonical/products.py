"""Canonical form of matrix products, library norms and losses."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rewriter.canonical.table import aten, rule
from rewriter.shadow import Shadow, Value


@rule(aten.linear)
def _linear(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    return shadow.add("linear", tuple(a for a in args[:3] if a is not None), (), node)


@rule(aten.matmul, aten.mm, operator.matmul)
def _matmul(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    left, right = args[:2]
    if right.op == "permute" and right.inputs[0].meta is not None and right.inputs[0].meta.ndim == 2:
        return shadow.add("linear", (left, right.inputs[0]), (), node)
    return shadow.add("matmul", (left, right), (), node)


@rule(aten.addmm)
def _addmm(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    bias, left, right, beta, alpha = args[:5]
    if (beta, alpha) != (1, 1) or right.op != "permute" or bias.meta is None or bias.meta.ndim != 1:
        return None
    return shadow.add("linear", (left, right.inputs[0], bias), (), node)


@rule(aten.rms_norm)
def _rms_norm(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, shape, weight, eps = args[:4]
    if len(shape) != 1 or value.meta is None:
        return None
    eps = torch.finfo(value.meta.dtype).eps if eps is None else eps
    weights = () if weight is None else (weight,)
    return shadow.add("rms_norm", (value, *weights, shadow.const(float(eps))), (), node)


@rule(aten.cross_entropy_loss)
def _cross_entropy(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    logits, target, weight, reduction, ignore_index, smoothing = args[:6]
    if target.meta is None or target.meta.dtype.is_floating_point:
        return None  # class probabilities as targets
    inputs = (logits, target) if weight is None else (logits, target, weight)
    return shadow.add("cross_entropy", inputs, (int(reduction), int(ignore_index), float(smoothing)), node)
