"""What operators of weights in 4 bits give in float64, which they don't know: the weights that the library unpacks in
float32, and an exact product with those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NESTED_BLOCKSIZE = 256  # the only one that the operator of a whole product knows


def _unpacked(A, absmax, blocksize, quant_type, shape, dtype=None):
    operator = torch.ops.bitsandbytes.dequantize_4bit.default
    return operator(A, absmax.float(), blocksize, quant_type, shape, torch.float32).double()


def _blockwise(A, absmax, code, blocksize, dtype=None):
    operator = torch.ops.bitsandbytes.dequantize_blockwise.default
    return operator(A, absmax.float(), code.float(), blocksize, torch.float32).double()


def _product(
    A, B, shapeB, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None
):
    if absmax_8bit is not None:
        absmax = _blockwise(absmax_8bit, absmax, absmax_code, NESTED_BLOCKSIZE) + absmax_offset
    return torch.nn.functional.linear(A, _unpacked(B, absmax, blocksize, quant_type, shapeB), bias)


# By the names of the operators; the parameters are called as in their schemas.
IN_FLOAT64: dict[str, Callable[..., Any]] = {
    "bitsandbytes::dequantize_4bit": _unpacked,
    "bitsandbytes::dequantize_blockwise": _blockwise,
    "bitsandbytes::gemm_4bit": _product,
}
