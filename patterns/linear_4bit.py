"""A frozen linear layer whose weight is in 4 bits: unpacked by one kernel, for forward and again for backward.

The model calls the library's own operators, or an `autograd.Function` around them; where no gradient is needed it goes
on doing that, as they are made for generation, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from rewriter.kernels.dequantize_4bit import CODES, Packed4bit, dequantize_4bit
from rewriter.kernels.linear_4bit import linear_4bit
from rewriter.pattern import Call, Match, Pattern, Reference

_BLOCKS = 3
PLAIN = {"packed": torch.zeros(48, 1, dtype=torch.uint8), "absmax": (_BLOCKS,)}
NESTED = {
    **PLAIN,
    "absmax": (1,),
    "codes": torch.zeros(_BLOCKS, dtype=torch.uint8),
    "nested_code": (256,),
    "offset": (),
}


def example_weight(tensors) -> torch.Tensor:
    """For references: the matrix [12, 8] of tensors as in PLAIN or NESTED."""
    second = tensors[2:] or (None, None, None)
    return dequantize_4bit(Packed4bit(*tensors[:2], *second, (12, 8), 32, 256, "nf4", torch.float32))


def weight_of(match: Match) -> Packed4bit:
    """The weight of a match, with nodes for tensors; its dtype is that in which the model multiplies by it."""
    shape, blocksize, nested_blocksize, quant_type = match.attrs("dequantize_4bit")
    tensors = [match[name] if name in match.tensors else None for name in NESTED]
    return Packed4bit(*tensors, shape, blocksize, nested_blocksize, quant_type, product_of(match).meta.dtype)


def product_of(match: Match):
    """The `linear` that multiplies by the unpacked weight."""
    weight = match.bound_operator("dequantize_4bit")
    return next(v for p, v in match.bound.items() if p.op == "linear" and _is_of(v, weight))


def _is_of(linear, weight) -> bool:
    value = linear.inputs[1]
    while value is not weight and value.op in ("cast", "copy"):
        value = value.inputs[0]
    return value is weight


CALL = "its library's operator"


def already(match: Match) -> str | None:
    """What the model calls, where unpacking to memory is no gain: without a gradient, one token needs none of that."""
    return None if match.root.meta.requires_grad else CALL


def why_not(match: Match) -> str | None:
    """A sentence, if the unpacking of a match is none that the kernel does."""
    shape, blocksize, _, quant_type = match.attrs("dequantize_4bit")
    if quant_type not in CODES:
        return f"a weight of type {quant_type}"
    if match.meta("packed").dtype is not torch.uint8:
        return f"the packed weight is kept as {match.meta('packed').dtype}"
    if not match.meta("packed").is_contiguous():
        return "the packed weight is not contiguous"
    if len(shape) != 2 or blocksize < 2 or blocksize & (blocksize - 1):
        return f"a weight of shape {list(shape)} in blocks of {blocksize}"
    if any(match.meta(name).requires_grad for name in NESTED if name in match.tensors):
        return "a part of the weight is trained"
    return None


def sample(match: Match, name: str, shapes: Mapping, generator: torch.Generator) -> torch.Tensor | None:
    if name in ("packed", "codes"):
        return torch.randint(0, 256, shapes[name], generator=generator, device=generator.device, dtype=torch.uint8)
    return None


def cut(match: Match, longest: int) -> dict[int, int]:
    """Rows of x alone, as the operators of a packed weight rely on the sizes of what they are given."""
    x = match.meta("x").shape
    others = {size for name, value in match.tensors.items() if name not in ("x", "z") for size in value.meta.shape}
    return {size: longest for size in x[:-1] if size > longest and size not in {x[-1], *others}}


def _reference(weight: Mapping, bias: Mapping) -> Reference:
    def layer(x, *rest):
        return F.linear(x, example_weight(rest[: len(weight)]), *rest[len(weight) :])

    return Reference(layer, {"x": (3, 8), **weight, **bias})


class Linear4bit(Pattern):
    name = "linear_4bit"
    references = tuple(_reference(weight, bias) for weight in (PLAIN, NESTED) for bias in ({}, {"bias": (12,)}))

    def already(self, match: Match) -> str | None:
        return already(match)

    def library(self, match: Match) -> str | None:
        return CALL

    def check(self, match: Match) -> str | None:
        return why_not(match)

    sample = staticmethod(sample)
    cut = staticmethod(cut)

    def replacement(self, match: Match) -> Call:
        weight = weight_of(match)
        bias = match["bias"] if "bias" in match.tensors else None
        note = {"type": weight.quant_type, "nested": weight.codes is not None}
        return Call(linear_4bit, (match["x"], weight, bias), {"out_dtype": match.root.meta.dtype}, note)


PATTERN = Linear4bit()
