"""Low-rank adapter of a frozen linear layer (Hu et al., "LoRA", 2021): `x W^T + b + scale * (z A^T) B^T`.

z is x, or x after a dropout, which stays where it is. Layers that share their input become one call.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.nn import functional as F

from rewriter.kernels.lora import lora as kernel
from rewriter.pattern import Call, Match, Pattern, Reference

X, WEIGHT, BIAS, DOWN, UP = (3, 8), (12, 8), (12,), (2, 8), (12, 2)
MOST_BRANCHES, MOST_RANK = 3, 256

# Where the number is that the branch is multiplied by.
SCALINGS: dict[str, Callable] = {
    "after": lambda up, down, z, scale: up(down(z)) * scale,
    "between": lambda up, down, z, scale: up(down(z) * scale),
    "before": lambda up, down, z, scale: up(down(z * scale)),
    "none": lambda up, down, z, scale: up(down(z)),
}


def _reference(scaling: str, bias: bool, transposed: bool) -> Reference:
    product = torch.matmul if transposed else F.linear

    def adapted(x, z, weight, down, up, *rest, scale=1.0):
        branch = SCALINGS[scaling](lambda u: product(u, up), lambda t: product(t, down), z, scale)
        return F.linear(x, weight, *rest) + branch

    a, b = (DOWN[::-1], UP[::-1]) if transposed else (DOWN, UP)
    inputs = {"x": X, "z": X, "weight": WEIGHT, "down": a, "up": b, **({"bias": BIAS} if bias else {})}
    consts = () if scaling == "none" else ("scale",)
    return Reference(adapted, inputs, consts, {"transposed": transposed})


class LoRA(Pattern):
    name = "lora"
    rounded_inputs = True
    references = tuple(_reference(*form) for form in itertools.product(SCALINGS, (True, False), (False, True)))

    def check(self, match: Match) -> str | None:
        x, weight, down, up = (match.meta(n) for n in ("x", "weight", "down", "up"))
        if weight.requires_grad:
            return "the layer's own weight is trained"
        if any(m.ndim != 2 or not all(m.static) for m in (weight, down, up)):
            return f"weight and adapters have shapes {list(weight.shape)}, {list(down.shape)} and {list(up.shape)}"
        if match.meta("z").shape != x.shape:
            return "layer and adapter have inputs of different shapes"
        rank = down.shape[-1 if match.variant["transposed"] else 0]
        if rank > MOST_RANK:
            return f"the rank of the adapter is {rank}"
        if len(set(match.rounded.values())) > 1:
            return "autocast rounds its operands to different dtypes"
        if "bias" in match.tensors and match.meta("bias").shape != weight.shape[:1]:
            return f"the bias has shape {list(match.meta('bias').shape)}"
        if down.dtype is not up.dtype and not match.rounded:
            return "the two matrices of the adapter differ in dtype"
        return None

    def group(self, matches: list[Match]) -> list[tuple[Match, ...]]:
        groups = defaultdict(list)
        for match in matches:
            dtypes = tuple(match.meta(n).dtype for n in ("weight", "down"))
            form = match.variant["transposed"], match.root.meta.dtype, tuple(match.rounded.values())[:1]
            groups[match.tensors["x"].number, match.tensors["z"].number, dtypes, form].append(match)
        return [
            tuple(group[i : i + MOST_BRANCHES])
            for group in groups.values()
            for i in range(0, len(group), MOST_BRANCHES)
        ]

    def replacement(self, *matches: Match) -> Call:
        first = matches[0]
        z = first["z"] if first.tensors["z"].number != first.tensors["x"].number else None
        tensors = [tuple(m[name] for m in matches) for name in ("weight", "down", "up")]
        biases = tuple(m["bias"] if "bias" in m.tensors else None for m in matches)
        scales = tuple(m.consts.get("scale", 1.0) for m in matches)
        options = {
            "scales": scales,
            "matmul_dtype": next(iter(first.rounded.values()), None),
            "out_dtype": first.root.meta.dtype,
            "transposed": first.variant["transposed"],
        }
        rank = first.meta("down").shape[-1 if first.variant["transposed"] else 0]
        note = {"layers": len(matches), "rank": rank, "scale": scales[0]}
        return Call(adapted if len(matches) > 1 else adapted_one, (first["x"], z, *tensors, biases), options, note)


def adapted(x, z, weights, down, up, biases, *, scales, matmul_dtype, out_dtype, transposed):
    if transposed:
        down, up = [a.t() for a in down], [b.t() for b in up]
    return kernel(x, weights, biases, down, up, scales, z=z, matmul_dtype=matmul_dtype, out_dtype=out_dtype)


def adapted_one(*tensors, **options):
    return adapted(*tensors, **options)[0]


PATTERN = LoRA()
