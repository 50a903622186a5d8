"""LayerNorm: `(x - mean) * rsqrt(var + eps)` over the last dimension, with weight, `1 + weight` or none, and bias.

Ba, Kiros and Hinton, "Layer Normalization" (2016). On a CPU a call of PyTorch's own layer_norm stays.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from rewriter.kernels.layer_norm import layer_norm as kernel
from rewriter.pattern import Call, Match, Pattern, Reference
from rewriter.patterns.rms_norm import as_row, row_check

X, W = (2, 3, 8), (8,)


def centred(x):
    return x - x.mean(-1, keepdim=True)


def factor(x, eps):
    return torch.rsqrt(centred(x).square().mean(-1, keepdim=True) + eps)


def factor_by_moments(x, eps):
    return torch.rsqrt(x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square() + eps)


def variance(x):
    return centred(x).square().mean(-1, keepdim=True)


# How the factor of a row is written: (function of x and constants, its constants). `outside` is an epsilon beside the
# root, `unbiased` what the unbiased variance is larger by than the biased one.
FACTORS = (
    (factor, ("eps",)),
    (factor_by_moments, ("eps",)),
    (lambda x, outside: 1 / (torch.sqrt(variance(x)) + outside), ("outside",)),
    (lambda x, outside, unbiased: 1 / (torch.sqrt(variance(x) * unbiased) + outside), ("outside", "unbiased")),
    (lambda x, eps, unbiased: torch.rsqrt(variance(x) * unbiased + eps), ("eps", "unbiased")),
)


def _references() -> tuple[Reference, ...]:
    references = []
    for row, own in FACTORS:

        def plain(x, *, _row=row, **consts):
            return centred(x) * _row(x, **consts)

        def weighted(x, weight, *, _row=row, **consts):
            return centred(x) * _row(x, **consts) * weight

        def weighted_factor(x, weight, *, _row=row, **consts):
            return centred(x) * (_row(x, **consts) * weight)

        def weighted_first(x, weight, *, _row=row, **consts):
            return (centred(x) * weight) * _row(x, **consts)

        def shifted(x, weight, *, offset, _row=row, **consts):
            return centred(x) * _row(x, **consts) * (offset + weight)

        forms = ((shifted, ("offset",)), (weighted, ()), (weighted_factor, ()), (weighted_first, ()))
        base = Reference(plain, {"x": X}, own, {"weight": "none", "bias": False})
        for fn, more in forms:
            kind = {"weight": "shifted" if more else "plain"}

            def with_bias(x, weight, bias, *, _fn=fn, **consts):
                return _fn(x, weight, **consts) + bias

            consts = (*own, *more)
            references.append(
                Reference(with_bias, {"x": X, "weight": W, "bias": W}, consts, kind | {"bias": True}, base)
            )
            references.append(Reference(fn, {"x": X, "weight": W}, consts, kind | {"bias": False}, base))
        references.append(base)
    library = {"library": True, "weight": "plain"}
    references.append(Reference(of_library, {"x": X, "weight": W, "bias": W}, ("eps",), library | {"bias": True}))
    references.append(Reference(of_library, {"x": X, "weight": W}, ("eps",), library | {"bias": False}))
    references.append(Reference(of_library, {"x": X}, ("eps",), library | {"weight": "none", "bias": False}))
    return tuple(references)


def of_library(x, weight=None, bias=None, *, eps):
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


class LayerNorm(Pattern):
    name = "layer_norm"
    references = _references()

    def check(self, match: Match) -> str | None:
        return row_check(match, "weight", "bias")

    def library(self, match: Match) -> str | None:
        return "layer_norm" if match.variant.get("library") else None

    def replacement(self, match: Match) -> Call:
        parts = [match[name] if name in match.tensors else None for name in ("weight", "bias")]
        return Call(fused_layer_norm, (match["x"], *parts), options(match), note(match))


def options(match: Match) -> dict:
    """The kernel's keyword arguments for a match of a LayerNorm."""
    unbiased = match.consts.get("unbiased", 1.0)
    return {
        "contiguous": bool(match.variant.get("library")),  # as PyTorch's own result is, whatever the layout of x
        "eps": match.consts.get("eps", 0.0) / unbiased,
        "outside": match.consts.get("outside", 0.0) / unbiased**0.5,
        "scale": unbiased**-0.5,
        "offset": match.consts.get("offset", 0.0),
        "round_before_weight": match.rounds("mul", "mul"),
        "out_dtype": match.root.meta.dtype,
    }


def note(match: Match) -> dict:
    return {"weight": match.variant["weight"], "bias": match.variant["bias"]}


def fused_layer_norm(x, weight, bias, *, eps, contiguous, **options):
    """The kernel, for a weight and a bias of any shape that broadcasts along the last dimension only."""
    y = kernel(x, as_row(weight, x), as_row(bias, x), eps, **options)
    return y.contiguous() if contiguous else y


PATTERN = LayerNorm()
