"""Heads that are more than a linear layer: with low-rank adapters, as the pattern `lora` knows them, or in 4 bits.

Of an adapter, what its first matrix gives is made by PyTorch's operators, with the random numbers of a dropout that
stands before it; what its second one adds to the logits is added to each chunk of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from rewriter.pattern import Match
from rewriter.patterns import linear_4bit as four_bits
from rewriter.patterns.lora import (
    inputs_of,
    is_rounded,
    layer_of,
    merged,
    misfit,
    numbered,
    ranks,
    scales_of,
    weight_of,
)
from rewriter.patterns.lora_forms import FORMS
from rewriter.shadow import Value

HEADS = (*FORMS, *four_bits.PATTERN.references)


def why_not(head: Match) -> str | None:
    """Why a match of one of HEADS can't be computed chunk by chunk, or None."""
    if (reason := misfit(head)) is not None:
        return reason
    weight = weight_of(head)
    kinds = {m.dtype for m in (weight, head.meta("x"), *(head.meta(n) for n in numbered(head, "down")))}
    if not all(d.is_floating_point for d in kinds):
        return f"the head's tensors are of {', '.join(sorted(map(str, kinds)))}"
    return None


def library(head: Match) -> str | None:
    """The library's operator that the model calls for a head in 4 bits."""
    return four_bits.CALL if "packed" in head.tensors else None


@dataclass(frozen=True)
class Parts:
    """Of a head, what its replacement is called with.

    x, z: what the layer sees, and what the adapters do, if that is something else
    """

    x: Value
    z: Value | None
    tensors: dict
    options: dict
    note: dict


def parts(head: Match) -> Parts:
    x, z, *_ = inputs_of(head)
    packed, matrices = "packed" in head.tensors, [head.meta(n) for n in numbered(head, "down")]
    weight, dtype = weight_of(head), next(iter(head.rounded.values()), None)
    if is_rounded(x, z, dtype or weight.dtype):
        x = z  # which the kernel rounds itself
    matmul_dtype = dtype or (None if x.meta.dtype is weight.dtype else weight.dtype)
    tensors = {"weight": weight if packed else head["weight"], "layer": layer_of(head)}
    options = {
        "matmul_dtype": matmul_dtype,
        "by_columns": head.variant.get("by_columns", False),
        "transposed": head.variant.get("transposed", False),
        "scales": scales_of(head),
        "adapter_dtype": (dtype or matrices[0].dtype) if matrices else None,
    }
    note = {"rank": sum(ranks(head)), "scale": options["scales"][0]} if matrices else {}
    if len(matrices) > 1:
        note["adapters"] = len(matrices)
    if packed:
        note["type"] = weight.quant_type
    return Parts(x, None if z.number == x.number else z, tensors, options, note)


def classes_of(head: Match, shapes: Mapping[str, tuple]) -> int:
    """How many classes there are where the tensors have these shapes."""
    if "packed" in head.tensors:
        return weight_of(head).shape[0]
    return shapes["weight"][1 if head.variant["by_columns"] else 0]


def sample(head: Match, name: str, shapes: Mapping, generator: torch.Generator) -> torch.Tensor | None:
    """Numbers that make logits of a size that a model has."""
    if (packed := four_bits.sample(head, name, shapes, generator)) is not None:
        return packed
    kind = name.rstrip("0123456789")
    if kind not in ("weight", "down", "up", "absmax", "offset"):
        return None
    length = shapes["x"][-1]
    if kind == "up":
        length = shapes[name][0 if head.variant["transposed"] else -1]
    return torch.randn(shapes[name], generator=generator, device=generator.device, dtype=torch.float32) / length**0.5


def first_product(x, layer: dict, scales: tuple[float, ...], transposed: bool, dtype: torch.dtype | None):
    """(bias or None, u [..., R], up [V, R]) of a head; u and up are None where it has no adapter."""
    if dtype is None:
        return layer.get("bias"), None, None
    bias, down, up, scale = merged(layer, scales, transposed)
    u = F.linear(x.to(dtype), down.to(dtype))
    return bias, u if scale == 1 else u * scale, up
