"""RMSNorm: `x * rsqrt(mean(x^2) + eps)` over the last dimension, with weight, `1 + weight`, or none.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). All dtype mixes are one pattern: the kernel computes
in fp32 and rounds where the model rounds (before the weight, or once at the end).
"""

from __future__ import annotations

import torch

from rewriter.kernels.rms_norm import rms_norm as kernel
from rewriter.pattern import Call, Match, Pattern, Reference

X, W = (2, 3, 8), (8,)


def normalised(x, *, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def weighted(x, weight, *, eps):
    return weight * normalised(x, eps=eps)


def weighted_scale(x, weight, *, eps):
    return x * (torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight)


def weighted_first(x, weight, *, eps):
    return (x * weight) * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def shifted(x, weight, *, eps, offset):
    return normalised(x, eps=eps) * (offset + weight)


def library(x, weight, *, eps):
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def library_plain(x, *, eps):
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), None, eps)


class RMSNorm(Pattern):
    name = "rms_norm"
    references = (
        Reference(shifted, {"x": X, "weight": W}, ("eps", "offset"), {"weight": "shifted"}),
        Reference(weighted, {"x": X, "weight": W}, ("eps",), {"weight": "plain"}),
        Reference(weighted_scale, {"x": X, "weight": W}, ("eps",), {"weight": "plain"}),
        Reference(weighted_first, {"x": X, "weight": W}, ("eps",), {"weight": "plain"}),
        Reference(library, {"x": X, "weight": W}, ("eps",), {"weight": "plain"}),
        Reference(normalised, {"x": X}, ("eps",), {"weight": "none"}),
        Reference(library_plain, {"x": X}, ("eps",), {"weight": "none"}),
    )

    def check(self, match: Match) -> str | None:
        x = match.meta("x")
        if not x.ndim or not x.static[-1]:
            return "the normalised dimension changes between calls"
        if "weight" in match.tensors:
            weight = match.meta("weight")
            if weight.shape[-1:] != x.shape[-1:] or weight.numel() != x.shape[-1]:
                return f"the weight has shape {list(weight.shape)}, not [{x.shape[-1]}]"
        return None

    def replacement(self, match: Match) -> Call:
        weight = match["weight"] if "weight" in match.tensors else None
        kwargs = {
            "eps": match.consts["eps"],
            "offset": match.consts.get("offset", 0.0),
            "round_before_weight": match.rounds("mul", "mul"),
            "out_dtype": match.root.meta.dtype,
        }
        return Call(fused_rms_norm, (match["x"], weight), kwargs, {"weight": match.variant["weight"]})


def fused_rms_norm(x, weight, *, eps, offset, round_before_weight, out_dtype):
    """The kernel, for a weight of any shape that broadcasts along the last dimension only."""
    if weight is not None and weight.dim() != 1:
        weight = weight.reshape(-1)
    return kernel(x, weight, eps, offset=offset, round_before_weight=round_before_weight, out_dtype=out_dtype)


PATTERN = RMSNorm()
