"""A residual sum and the LayerNorm of it in one: `s = x + residual`, `y = layer_norm(s)`; both are results.

One pass over memory less in each direction: the backward of the norm adds the gradient that comes along the residual.
"""

from __future__ import annotations

from rewriter.kernels.layer_norm import add_layer_norm as kernel
from rewriter.pattern import Call, Match, Pattern, Reference
from rewriter.patterns import layer_norm, rms_norm


def _with_sum(reference: Reference) -> Reference:
    def added(x, residual, *weights, **consts):
        total = x + residual
        return reference.fn(total, *weights, **consts), total

    inputs = dict(reference.inputs)
    return Reference(
        added,
        {"x": inputs.pop("x"), "residual": layer_norm.X, **inputs},
        reference.consts,
        reference.variant,
        reference,
    )


class AddLayerNorm(Pattern):
    name = "add_layer_norm"
    parts = ("layer_norm",)
    references = tuple(_with_sum(r) for r in layer_norm.LayerNorm.references)

    def check(self, match: Match) -> str | None:
        x, residual = match.meta("x"), match.meta("residual")
        if x.shape != residual.shape or x.static != residual.static:
            return f"the summands have shapes {list(x.shape)} and {list(residual.shape)}"
        return layer_norm.PATTERN.check(match)

    def replacement(self, match: Match) -> Call:
        parts = [match[name] if name in match.tensors else None for name in ("weight", "bias")]
        arguments = (match["x"], match["residual"], *parts)
        return Call(fused_add_layer_norm, arguments, layer_norm.options(match), layer_norm.note(match))


def fused_add_layer_norm(x, residual, weight, bias, *, eps, contiguous, **options):
    y, total = kernel(x, residual, rms_norm.as_row(weight, x), rms_norm.as_row(bias, x), eps, **options)
    return y.contiguous() if contiguous else y, total


PATTERN = AddLayerNorm()
