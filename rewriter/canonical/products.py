"""Canonical form of matrix products, attention and library norms."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rewriter.canonical.table import aten, rule
from rewriter.meta import tensor_meta
from rewriter.shadow import Shadow, Value


@rule(aten.linear)
def _linear(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value:
    return shadow.add("linear", tuple(a for a in args[:3] if a is not None), (), node)


@rule(aten.matmul, aten.mm, aten.bmm, operator.matmul)
def _matmul(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    left, right = args[:2]
    if right.op == "permute" and right.inputs[0].meta is not None and right.inputs[0].meta.ndim == 2:
        return shadow.add("linear", (left, right.inputs[0]), (), node)
    return shadow.add("matmul", (left, right), (), node)


@rule(aten.addmm, aten.baddbmm)
def _sum_with_product(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    """beta * added + alpha * (left @ right)"""
    added, left, right, beta, alpha = args[:5]
    if not all(isinstance(n, int | float) for n in (beta, alpha)) or added.meta is None:
        return None
    by_weight = right.op == "permute" and right.inputs[0].meta is not None and right.inputs[0].meta.ndim == 2
    if by_weight and (beta, alpha) == (1, 1) and added.meta.ndim == 1:
        return shadow.add("linear", (left, right.inputs[0], added), (), node)
    meta = tensor_meta(node)
    op, factors = ("linear", (left, right.inputs[0])) if by_weight else ("matmul", (left, right))
    product = shadow.add(op, factors, meta=meta)
    if alpha != 1:
        product = shadow.add("mul", (product, shadow.const(float(alpha))), meta=meta)
    if beta == 0:
        return shadow.add(product.op, product.inputs, product.attrs, node)
    if beta != 1:
        added = shadow.add("mul", (added, shadow.const(float(beta))), meta=added.meta)
    return shadow.add("add", (product, added), (), node)


@rule(aten.scaled_dot_product_attention)
def _attention(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    query, key, value, mask, dropout, is_causal, *_ = args
    scale = node.kwargs.get("scale")
    if scale is not None and not isinstance(scale, int | float):
        return None
    attrs = (bool(is_causal), scale, bool(node.kwargs.get("enable_gqa", False)), float(dropout))
    inputs = (query, key, value, *([mask] if mask is not None else []))
    return shadow.add("attention", inputs, attrs, node, unique=bool(dropout))


@rule(aten.layer_norm)
def _layer_norm(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, shape, weight, bias, eps = args[:5]
    if len(shape) != 1 or value.meta is None or (weight is None and bias is not None):
        return None
    parts = tuple(w for w in (weight, bias) if w is not None)
    return shadow.add("layer_norm", (value, *parts, shadow.const(float(eps))), (), node)


@rule(aten.rms_norm)
def _rms_norm(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    value, shape, weight, eps = args[:4]
    if len(shape) != 1 or value.meta is None:
        return None
    eps = torch.finfo(value.meta.dtype).eps if eps is None else eps
    weights = () if weight is None else (weight,)
    return shadow.add("rms_norm", (value, *weights, shadow.const(float(eps))), (), node)
