"""Low-rank adapters of a frozen linear layer (Hu et al., "LoRA", 2021): `x W^T + b + scale * (z A^T) B^T`.

z is x, or x after a dropout, which stays where it is. Several adapters of one layer that see the same z are one of the
sum of their ranks. Layers that share their input become one call. W is a matrix, or in 4 bits (QLoRA).
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from rewriter.kernels.dequantize_4bit import Packed4bit
from rewriter.kernels.lora import lora as kernel
from rewriter.meta import TensorMeta
from rewriter.pattern import Call, Match, Pattern
from rewriter.patterns import linear_4bit as four_bits
from rewriter.patterns.lora_forms import FORMS
from rewriter.patterns.lora_lookalikes import LOOKALIKES, why_not
from rewriter.shadow import Value, is_row_operator

MOST_BRANCHES, MOST_RANK = 3, 256
ALONE = ("bias", "gain", "divisor", "middle", "up_bias")  # holes of which a layer has one, if at all


def weight_of(match: Match) -> TensorMeta | Packed4bit:
    """Shape, dtype and more of the weight of a match."""
    return four_bits.weight_of(match) if "packed" in match.tensors else match.meta("weight")


class LoRA(Pattern):
    name = "lora"
    rounded_inputs = True
    row_operators = True
    attempts = False
    references = FORMS
    lookalikes = LOOKALIKES

    def why_not(self, match: Match) -> str | None:
        return why_not(match)

    def already(self, match: Match) -> str | None:
        return four_bits.already(match) if "packed" in match.tensors else None

    def library(self, match: Match) -> str | None:
        return four_bits.CALL if "packed" in match.tensors else None

    def sample(self, match, name, shapes, generator):
        return four_bits.sample(match, name, shapes, generator)

    def cut(self, match, longest):
        return four_bits.cut(match, longest) if "packed" in match.tensors else None

    def check(self, match: Match) -> str | None:
        return "the layer's own weight is trained" if weight_of(match).requires_grad else misfit(match)

    def group(self, matches: list[Match]) -> list[tuple[Match, ...]]:
        groups = defaultdict(list)
        for match in matches:
            down = match.meta(numbered(match, "down")[0])
            dtypes = weight_of(match).dtype, down.dtype, "packed" in match.tensors
            form = match.root.meta.dtype, match.root.meta.shape[:-1], tuple(match.rounded.values())[:1]
            groups[tuple(v.number for v in inputs_of(match)[:2]), dtypes, form].append(match)
        return [
            tuple(group[i : i + MOST_BRANCHES])
            for group in groups.values()
            for i in range(0, len(group), MOST_BRANCHES)
        ]

    def replacement(self, *matches: Match) -> Call:
        first = matches[0]
        x, z, *_ = inputs_of(first)
        matmul_dtype = next(iter(first.rounded.values()), None)
        if is_rounded(x, z, matmul_dtype or weight_of(first).dtype):
            x = z  # which the kernel rounds itself: the casts of several layers are then none of their inputs
        options = {
            "scales": tuple(scales_of(match) for match in matches),
            "forms": tuple((match.variant["by_columns"], match.variant["transposed"]) for match in matches),
            "matmul_dtype": matmul_dtype,
            "out_dtype": first.root.meta.dtype,
        }
        note = {"layers": len(matches), "rank": sum(ranks(first)), "scale": options["scales"][0][0]}
        if len(ranks(first)) > 1:
            note["adapters"] = len(ranks(first))
        if {"gain", "divisor", "middle"} & first.tensors.keys():
            note["factors"] = "tensors"
        weights = tuple(weight_of(m) if "packed" in m.tensors else m["weight"] for m in matches)
        tensors = x.node, None if z.number == x.number else z.node, weights, tuple(map(layer_of, matches))
        return Call(adapted if len(matches) > 1 else adapted_one, tensors, options, note)


def misfit(match: Match) -> str | None:
    """Why a layer and its adapters, as one of FORMS has them, are none that can be computed apart; or None."""
    if "packed" in match.tensors and (reason := four_bits.why_not(match)) is not None:
        return reason
    weight, root = weight_of(match), match.root.meta
    matrices = [match.meta(name) for name in numbered(match, "down", "up")]
    if any(len(m.shape) != 2 or not all(m.static) for m in (weight, *matrices)):
        return f"weight and adapters have shapes {', '.join(str(list(m.shape)) for m in (weight, *matrices))}"
    if any(v.op == "slice" for _, _, passed in match.passed for v in passed):
        return "only a part of the rows goes through the adapter"
    x, *seen = inputs_of(match)
    if len({z.number for z in seen}) > 1:
        return "its adapters have inputs of their own, each after another dropout, say"
    if any(z.meta.shape[:-1] != root.shape[:-1] for z in (x, *seen)):
        return "layer and adapter have inputs of different shapes"
    rank = sum(ranks(match))
    if rank > MOST_RANK:
        return f"the rank of the adapter is {rank}"
    if len(set(match.rounded.values())) > 1:
        return "autocast rounds its operands to different dtypes"
    if "packed" in match.tensors and match.rounded and weight.dtype not in match.rounded.values():
        return f"autocast rounds to {next(iter(match.rounded.values()))}, its weight is used in {weight.dtype}"
    if "bias" in match.tensors and match.meta("bias").shape != (weight.shape[match.variant.get("by_columns", False)],):
        return f"the bias has shape {list(match.meta('bias').shape)}"
    if len({m.dtype for m in matrices}) > 1 and not match.rounded:
        return "the matrices of the adapter differ in dtype"
    for name, width in (("gain", root.shape[-1]), ("divisor", root.shape[-1]), ("middle", rank)):
        if name in match.tensors and match.meta(name).shape not in ((), (1,), (width,)):
            return f"the adapter is multiplied by a tensor of shape {list(match.meta(name).shape)}"
    return None


def numbered(match: Match, *names: str) -> list[str]:
    """The holes of these names, one for each adapter."""
    return [hole for name in names for hole in match.reference.inputs if hole.rstrip("0123456789") == name]


def inputs_of(match: Match) -> list[Value]:
    """What the layer sees, and what each adapter does; as it was before its rows were regrouped, where their sum is."""
    inputs = [match.tensors[name] for name in ("x", *numbered(match, "z"))]
    for i, value in enumerate(inputs):
        while value.meta.shape[:-1] != match.root.meta.shape[:-1] and value.op == "reshape" and is_row_operator(value):
            value = value.inputs[0]
        inputs[i] = value
    return inputs if len(inputs) > 1 else inputs * 2


def is_rounded(x: Value, z: Value, dtype: torch.dtype) -> bool:
    """Whether x is z, cast to what the layer's weight is multiplied in."""
    return x.op == "cast" and x.inputs[0].number == z.number and x.meta.dtype is dtype


def ranks(match: Match) -> list[int]:
    return [match.meta(name).shape[-1 if match.variant["transposed"] else 0] for name in numbered(match, "down")]


def scales_of(match: Match) -> tuple[float, ...]:
    places = ("before", "between", "after")
    return tuple(math.prod(match.consts.get(f"{p}{i}", 1.0) for p in places) for i in range(len(ranks(match))))


def layer_of(match: Match) -> dict:
    given = {name: match[name] for name in ALONE if name in match.tensors}
    return given | {name: tuple(match[hole] for hole in numbered(match, name)) for name in ("down", "up")}


def adapted(x, z, weights, layers, *, scales, forms, matmul_dtype, out_dtype):
    weights = [w.t() if by_columns else w for w, (by_columns, _) in zip(weights, forms, strict=True)]
    biases, downs, ups, factors = [], [], [], []
    for layer, own, (_, transposed) in zip(layers, scales, forms, strict=True):
        bias, down, up, factor = merged(layer, own, transposed)
        biases.append(bias)
        downs.append(down)
        ups.append(up)
        factors.append(factor)
    return kernel(x, weights, biases, downs, ups, factors, z=z, matmul_dtype=matmul_dtype, out_dtype=out_dtype)


def merged(layer: dict, scales: tuple[float, ...], transposed: bool):
    """(bias or None, A [R, D], B [V, R], scale) of one layer with all its adapters and their factors."""
    down, up = layer["down"], layer["up"]
    if transposed:
        down, up = [a.t() for a in down], [b.t() for b in up]
    down, up, factor = _as_one(down, up, scales)
    if "middle" in layer:
        down = (down * _by_rows(layer["middle"])).to(down.dtype)
    if "gain" in layer:
        up = (up * _by_rows(layer["gain"])).to(up.dtype)
    if "divisor" in layer:
        up = (up / _by_rows(layer["divisor"])).to(up.dtype)
    bias = layer.get("bias")
    if "up_bias" in layer:
        added = layer["up_bias"] * factor
        bias = added if bias is None else bias + added
    return bias, down, up, factor


def _by_rows(factor):
    return factor.unsqueeze(-1) if factor.dim() else factor


def _as_one(down, up, scales):
    """One adapter for several of the same input, and its scale."""
    if len(down) == 1:
        return down[0], up[0], scales[0]
    largest = max(scales, key=abs) or 1.0
    down = [a if s == largest else (a * (s / largest)).to(a.dtype) for a, s in zip(down, scales, strict=True)]
    return torch.cat(down), torch.cat(list(up), 1), largest


def adapted_one(*tensors, **options):
    return adapted(*tensors, **options)[0]


PATTERN = LoRA()
