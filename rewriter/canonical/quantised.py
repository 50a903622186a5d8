"""Canonical form of operators of weights in 4 bits: unpacking is one, and a layer is `linear` of what that gives.

dequantize_4bit(packed, absmax[, codes, nested_code, offset])   attrs: shape, blocksize, nested_blocksize, code name
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from rewriter.canonical.table import rule
from rewriter.meta import TensorMeta, tensor_meta
from rewriter.quantised import NESTED_BLOCKSIZE
from rewriter.shadow import Shadow, Value

OPERATORS = {"bitsandbytes::gemm_4bit", "bitsandbytes::dequantize_4bit"}


@rule("rewriter::dequantize_4bit")
def _ours(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    packed, absmax, codes, nested_code, offset, nested_blocksize, shape, blocksize, quant_type, *_ = args
    inputs = tuple(t for t in (packed, absmax, codes, nested_code, offset) if t is not None)
    return shadow.add("dequantize_4bit", inputs, (tuple(shape), blocksize, nested_blocksize, quant_type), node)


@rule("bitsandbytes::dequantize_blockwise")
def _blockwise(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    codes, absmax, code, blocksize, dtype = args
    return (
        None if dtype is not torch.float32 else shadow.add("dequantize_8bit", (absmax, codes, code), (blocksize,), node)
    )


@rule("bitsandbytes::dequantize_4bit")
def _unpacking(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    packed, absmax, blocksize, quant_type, shape, _ = args
    scales, nested_blocksize = _scales(absmax)
    return _unpacked(shadow, node, packed, scales, shape, (blocksize, nested_blocksize, quant_type), tensor_meta(node))


@rule("bitsandbytes::gemm_4bit")
def _product(shadow: Shadow, node: fx.Node, args: list[Any]) -> Value | None:
    x, packed, shape, absmax, blocksize, quant_type, bias, codes, nested_code, offset = args
    scales = (absmax,) if codes is None else (absmax, codes, nested_code, offset)
    attrs = blocksize, 0 if codes is None else NESTED_BLOCKSIZE, quant_type
    if x.meta is None or packed.meta is None or not all(isinstance(n, int) for n in shape):
        return None
    meta = replace(packed.meta, shape=tuple(shape), stride=(shape[1], 1), dtype=x.meta.dtype, static=(True, True))
    weight = _unpacked(shadow, None, packed, scales, shape, attrs, meta)
    return None if weight is None else shadow.add("linear", (x, weight, *([] if bias is None else [bias])), (), node)


def _scales(absmax: Value) -> tuple[tuple[Value, ...], int]:
    """What absmax is made of, where it is in 8 bits, and the blocksize of that."""
    if absmax.op == "add":
        for product, offset in (absmax.inputs, absmax.inputs[::-1]):
            if product.op == "dequantize_8bit" and offset.meta is not None and not offset.meta.ndim:
                return (*product.inputs, offset), product.attrs[0]
    return (absmax,), 0


def _unpacked(
    shadow: Shadow,
    node: fx.Node | None,
    packed: Value,
    scales: tuple,
    shape: list,
    attrs: tuple,
    meta: TensorMeta | None,
) -> Value | None:
    while packed.op in ("reshape", "permute", "copy") and packed.inputs[0].meta is not None:
        source = packed.inputs[0].meta  # the bytes in their order are what counts
        if not source.is_contiguous() or (packed.op == "permute" and max(source.shape) != source.numel()):
            break
        packed = packed.inputs[0]
    blocksize, nested_blocksize, quant_type = attrs
    attrs = tuple(shape), blocksize, nested_blocksize, quant_type
    return shadow.add("dequantize_4bit", (packed, *scales), attrs, node, meta)
