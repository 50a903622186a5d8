"""RMSNorm: `x * rsqrt(mean(x^2) + eps)` over the last dimension, with weight, `1 + weight`, or none.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). The 2-norm in place of the root of the mean is the
same up to a constant. All dtype mixes are one pattern: the kernel computes in fp32 and rounds where the model rounds
(before the weight, or once at the end).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from rewriter.kernels.rms_norm import rms_norm as kernel
from rewriter.pattern import Call, Match, Pattern, Reference

X, W = (2, 3, 8), (8,)


def square_mean(x):
    return x.square().mean(-1, keepdim=True)


def square_sum(x):
    return x.square().sum(-1, keepdim=True)


# How the factor of a row is written: name -> (function of x and constants, its constants). What they mean for the
# kernel's eps, floor and scale is in `row_options`.
FACTORS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "mean": (lambda x, eps: torch.rsqrt(square_mean(x) + eps), ("eps",)),
    "mean, clamped": (lambda x, eps: torch.rsqrt(square_mean(x).clamp_min(eps)), ("eps",)),
    "norm": (lambda x, eps: torch.rsqrt(square_sum(x) + eps), ("eps",)),
    "norm, clamped": (lambda x, eps: torch.rsqrt(square_sum(x).clamp_min(eps)), ("eps",)),
    "norm, then clamped": (lambda x, eps: 1 / torch.sqrt(square_sum(x)).clamp_min(eps), ("eps",)),
    "root, then clamped": (lambda x, eps: 1 / torch.sqrt(square_mean(x)).clamp_min(eps), ("eps",)),
    "norm, eps outside": (lambda x, eps: 1 / (torch.sqrt(square_sum(x)) + eps), ("eps",)),
    "root, eps outside": (lambda x, eps: 1 / (torch.sqrt(square_mean(x)) + eps), ("eps",)),
    "norm alone": (lambda x: torch.rsqrt(square_sum(x)), ()),
    "mean alone": (lambda x: torch.rsqrt(square_mean(x)), ()),
}


def row_options(factor: str, width: int, eps: float = 0.0) -> dict[str, float]:
    """Options of the kernel's `scale / max(sqrt(mean(x^2) + eps) + outside, floor)`, for rows of this width."""
    norm = factor.startswith("norm")
    share = 1 / width if norm else 1.0  # of the sum of squares that the mean is
    options = {"eps": 0.0, "scale": share**0.5}
    if factor.endswith("outside"):
        options["outside"] = eps * share**0.5
    elif factor.endswith("then clamped"):
        options["floor"] = eps * share**0.5
    elif factor.endswith("clamped"):
        options["floor"] = (eps * share) ** 0.5
    else:
        options["eps"] = eps * share
    return options


def _references() -> tuple[Reference, ...]:
    references = []
    for name, (factor, consts) in FACTORS.items():

        def plain(x, *, _factor=factor, **eps):
            return x * _factor(x, **eps)

        def scaled(x, *, gain, _factor=factor, **eps):
            return x * _factor(x, **eps) * gain

        def scaled_factor(x, *, gain, _factor=factor, **eps):
            return x * (_factor(x, **eps) * gain)

        def weighted(x, weight, *, _factor=factor, **eps):
            return weight * (x * _factor(x, **eps))

        def weighted_factor(x, weight, *, _factor=factor, **eps):
            return x * (_factor(x, **eps) * weight)

        def weighted_first(x, weight, *, _factor=factor, **eps):
            return (x * weight) * _factor(x, **eps)

        def weighted_scaled(x, weight, *, gain, _factor=factor, **eps):
            return weight * (x * _factor(x, **eps) * gain)

        def shifted(x, weight, *, offset, _factor=factor, **eps):
            return (x * _factor(x, **eps)) * (offset + weight)

        def shifted_factor(x, weight, *, offset, _factor=factor, **eps):
            return x * (_factor(x, **eps) * (offset + weight))

        forms = (
            (shifted, ("offset",)), (shifted_factor, ("offset",)), (weighted_scaled, ("gain",)), (weighted, ()),
            (weighted_factor, ()), (weighted_first, ()), (scaled, ("gain",)), (scaled_factor, ("gain",)),
        )  # fmt: skip
        base = Reference(plain, {"x": X}, consts, {"weight": "none", "factor": name})
        for fn, more in forms:
            kind = "shifted" if more == ("offset",) else "none" if fn in (scaled, scaled_factor) else "plain"
            inputs = {"x": X} if kind == "none" else {"x": X, "weight": W}
            variant = {"weight": kind, "factor": name}
            references.append(Reference(fn, inputs, (*consts, *more), variant, extends=base))
        references.append(base)
    library = {"factor": "mean", "weight": "plain"}
    references.append(Reference(of_library, {"x": X, "weight": W}, ("eps",), library))
    references.append(Reference(plain_of_library, {"x": X}, ("eps",), library | {"weight": "none"}))
    return tuple(references)


def of_library(x, weight, *, eps):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def plain_of_library(x, *, eps):
    return F.rms_norm(x, (x.shape[-1],), None, eps)


def row_check(match: Match, *names: str) -> str | None:
    """Why rows of x can't be normalised with weights of these names, or None."""
    x = match.meta("x")
    if not x.ndim or not x.static[-1]:
        return "the normalised dimension changes between calls"
    for name in names:
        if name in match.tensors:
            weight = match.meta(name)
            if weight.numel() == 1:
                continue
            if weight.shape[-1:] != x.shape[-1:] or weight.numel() != x.shape[-1]:
                return f"the {name} has shape {list(weight.shape)}, not [{x.shape[-1]}]"
    return None


class RMSNorm(Pattern):
    name = "rms_norm"
    references = _references()

    def check(self, match: Match) -> str | None:
        return row_check(match, "weight")

    def replacement(self, match: Match) -> Call:
        weight = match["weight"] if "weight" in match.tensors else None
        return Call(fused_rms_norm, (match["x"], weight), options(match), {"weight": match.variant["weight"]})


def options(match: Match) -> dict:
    """The kernel's keyword arguments for a match of an RMSNorm."""
    consts = dict(match.consts)
    kwargs = row_options(match.variant["factor"], match.meta("x").shape[-1], consts.get("eps", 0.0))
    kwargs["scale"] *= consts.get("gain", 1.0)
    return kwargs | {
        "offset": consts.get("offset", 0.0),
        "round_before_weight": match.rounds("mul", "mul"),
        "out_dtype": match.root.meta.dtype,
    }


def fused_rms_norm(x, weight, *, eps, **options):
    """The kernel, for a weight of any shape that broadcasts along the last dimension only."""
    return kernel(x, as_row(weight, x), eps, **options)


def as_row(weight, x):
    """A weight [D]; one number is one for each feature of x."""
    if weight is None or weight.shape == x.shape[-1:]:
        return weight
    return weight.reshape(-1).expand(x.shape[-1]).contiguous() if weight.numel() == 1 else weight.reshape(-1)


PATTERN = RMSNorm()
