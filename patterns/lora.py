"""Low-rank adapter of a frozen linear layer (Hu et al., "LoRA", 2021): `x W^T + b + scale * (z A^T) B^T`.

z is x, or x after a dropout, which stays where it is. Layers that share their input become one call. W is a matrix, or
in 4 bits (QLoRA).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.nn import functional as F

from rewriter.kernels.dequantize_4bit import Packed4bit
from rewriter.kernels.lora import lora as kernel
from rewriter.meta import TensorMeta
from rewriter.pattern import Call, Match, Pattern, Reference
from rewriter.patterns import linear_4bit as four_bits
from rewriter.shadow import Value

X, WEIGHT, BIAS, DOWN, UP = (3, 8), (12, 8), (12,), (2, 8), (12, 2)
MOST_BRANCHES, MOST_RANK = 3, 256

# Where the number is that the branch is multiplied by.
SCALINGS: dict[str, Callable] = {
    "after": lambda up, down, z, scale: up(down(z)) * scale,
    "between": lambda up, down, z, scale: up(down(z) * scale),
    "before": lambda up, down, z, scale: up(down(z * scale)),
    "none": lambda up, down, z, scale: up(down(z)),
}


# What the weight is made of, and for those in 4 bits the layer alone, which every graph with one of them has.
WEIGHTS = {
    "matrix": ({"weight": WEIGHT}, None),
    "4 bits": (four_bits.PLAIN, four_bits.PATTERN.references[0]),
    "4 bits, nested": (four_bits.NESTED, four_bits.PATTERN.references[2]),
}


def _reference(weights: str, scaling: str, bias: bool, transposed: bool) -> Reference:
    product = torch.matmul if transposed else F.linear
    parts, layer = WEIGHTS[weights]

    def adapted(x, z, down, up, *rest, scale=1.0):
        weight, rest = rest[: len(parts)], rest[len(parts) :]
        weight = weight[0] if layer is None else four_bits.example_weight(weight)
        branch = SCALINGS[scaling](lambda u: product(u, up), lambda t: product(t, down), z, scale)
        return F.linear(x, weight, *rest) + branch

    a, b = (DOWN[::-1], UP[::-1]) if transposed else (DOWN, UP)
    inputs = {"x": X, "z": X, "down": a, "up": b, **parts, **({"bias": BIAS} if bias else {})}
    consts = () if scaling == "none" else ("scale",)
    return Reference(adapted, inputs, consts, {"transposed": transposed}, extends=layer)


def weight_of(match: Match) -> TensorMeta | Packed4bit:
    """Shape, dtype and more of the weight of a match."""
    return four_bits.weight_of(match) if "packed" in match.tensors else match.meta("weight")


class LoRA(Pattern):
    name = "lora"
    rounded_inputs = True
    references = tuple(_reference(*form) for form in itertools.product(WEIGHTS, SCALINGS, (True, False), (False, True)))

    def already(self, match: Match) -> str | None:
        return four_bits.library(match) if "packed" in match.tensors else None

    def sample(self, match, name, shapes, generator):
        return four_bits.sample(match, name, shapes, generator)

    def cut(self, match, longest):
        return four_bits.cut(match, longest) if "packed" in match.tensors else None

    def check(self, match: Match) -> str | None:
        x, down, up = (match.meta(n) for n in ("x", "down", "up"))
        if "packed" in match.tensors and (reason := four_bits.why_not(match)) is not None:
            return reason
        weight = weight_of(match)
        if weight.requires_grad:
            return "the layer's own weight is trained"
        if any(len(m.shape) != 2 or not all(m.static) for m in (weight, down, up)):
            return f"weight and adapters have shapes {list(weight.shape)}, {list(down.shape)} and {list(up.shape)}"
        if match.meta("z").shape != x.shape:
            return "layer and adapter have inputs of different shapes"
        rank = down.shape[-1 if match.variant["transposed"] else 0]
        if rank > MOST_RANK:
            return f"the rank of the adapter is {rank}"
        if len(set(match.rounded.values())) > 1:
            return "autocast rounds its operands to different dtypes"
        if "packed" in match.tensors and match.rounded and weight.dtype not in match.rounded.values():
            return f"autocast rounds to {next(iter(match.rounded.values()))}, its weight is used in {weight.dtype}"
        if "bias" in match.tensors and match.meta("bias").shape != weight.shape[:1]:
            return f"the bias has shape {list(match.meta('bias').shape)}"
        if down.dtype is not up.dtype and not match.rounded:
            return "the two matrices of the adapter differ in dtype"
        return None

    def group(self, matches: list[Match]) -> list[tuple[Match, ...]]:
        groups = defaultdict(list)
        for match in matches:
            dtypes = weight_of(match).dtype, match.meta("down").dtype, "packed" in match.tensors
            form = match.variant["transposed"], match.root.meta.dtype, tuple(match.rounded.values())[:1]
            groups[match.tensors["x"].number, match.tensors["z"].number, dtypes, form].append(match)
        return [
            tuple(group[i : i + MOST_BRANCHES])
            for group in groups.values()
            for i in range(0, len(group), MOST_BRANCHES)
        ]

    def replacement(self, *matches: Match) -> Call:
        first = matches[0]
        matmul_dtype = next(iter(first.rounded.values()), None)
        x, z = first["x"], first["z"]
        if _is_rounded(first.tensors["x"], first.tensors["z"], matmul_dtype or weight_of(first).dtype):
            x = z  # which the kernel rounds itself: the casts of several layers are then none of their inputs
        z = z if z is not x and first.tensors["z"].number != first.tensors["x"].number else None
        weights = tuple(four_bits.weight_of(m) if "packed" in m.tensors else m["weight"] for m in matches)
        tensors = [weights, *(tuple(m[name] for m in matches) for name in ("down", "up"))]
        biases = tuple(m["bias"] if "bias" in m.tensors else None for m in matches)
        scales = tuple(m.consts.get("scale", 1.0) for m in matches)
        options = {
            "scales": scales,
            "matmul_dtype": matmul_dtype,
            "out_dtype": first.root.meta.dtype,
            "transposed": first.variant["transposed"],
        }
        rank = first.meta("down").shape[-1 if first.variant["transposed"] else 0]
        note = {"layers": len(matches), "rank": rank, "scale": scales[0]}
        return Call(adapted if len(matches) > 1 else adapted_one, (x, z, *tensors, biases), options, note)


def _is_rounded(x: Value, z: Value, dtype: torch.dtype) -> bool:
    """Whether x is z, cast to what the layer's weight is multiplied in."""
    return x.op == "cast" and x.inputs[0].number == z.number and x.meta.dtype is dtype


def adapted(x, z, weights, down, up, biases, *, scales, matmul_dtype, out_dtype, transposed):
    if transposed:
        down, up = [a.t() for a in down], [b.t() for b in up]
    return kernel(x, weights, biases, down, up, scales, z=z, matmul_dtype=matmul_dtype, out_dtype=out_dtype)


def adapted_one(*tensors, **options):
    return adapted(*tensors, **options)[0]


PATTERN = LoRA()
