"""A residual sum and the RMSNorm of it in one: `s = x + residual`, `y = rms_norm(s)`; both are results.

One pass over memory less in each direction: the backward of the norm adds the gradient that comes along the residual.
"""

from __future__ import annotations

from rewriter.kernels.rms_norm import add_rms_norm as kernel
from rewriter.pattern import Call, Match, Pattern, Reference
from rewriter.patterns import rms_norm


def _with_sum(reference: Reference) -> Reference:
    def added(x, residual, *weights, **consts):
        total = x + residual
        return reference.fn(total, *weights, **consts), total

    inputs = dict(reference.inputs)
    return Reference(
        added, {"x": inputs.pop("x"), "residual": rms_norm.X, **inputs}, reference.consts, reference.variant, reference
    )


class AddRMSNorm(Pattern):
    name = "add_rms_norm"
    parts = ("rms_norm",)
    references = tuple(_with_sum(r) for r in rms_norm.RMSNorm.references)

    def check(self, match: Match) -> str | None:
        x, residual = match.meta("x"), match.meta("residual")
        if x.shape != residual.shape or x.static != residual.static:
            return f"the summands have shapes {list(x.shape)} and {list(residual.shape)}"
        return rms_norm.PATTERN.check(match)

    def replacement(self, match: Match) -> Call:
        weight = match["weight"] if "weight" in match.tensors else None
        note = {"weight": match.variant["weight"]}
        return Call(fused_add_rms_norm, (match["x"], match["residual"], weight), rms_norm.options(match), note)


def fused_add_rms_norm(x, residual, weight, *, eps, **options):
    return kernel(x, residual, rms_norm.as_row(weight, x), eps, **options)


PATTERN = AddRMSNorm()
