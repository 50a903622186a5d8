"""Linear head and cross entropy in one: `cross_entropy(softcap(scale * (x @ weight.T + bias)), target)`.

The logits are never held: the kernel works on chunks of tokens. Where the model also returns its logits, they leave as
a tensor that is computed on demand. Slices and reshapes of rows between the two (the shift by one position, the
flattening) act on `x` instead, since the head treats every row by itself.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from rewriter.kernels.linear_cross_entropy import linear_cross_entropy as kernel
from rewriter.matcher import is_row_operator
from rewriter.pattern import Call, Match, Pattern, Reference
from rewriter.shadow import Value

REDUCTIONS = ("none", "mean", "sum")  # ATen's order
TARGET = torch.zeros(6, dtype=torch.int64)


def _references() -> tuple[Reference, ...]:
    def plain(z):
        return z

    def scaled(z, *, scale):
        return z * scale

    def softcapped(z, *, softcap):
        return torch.tanh(z / softcap) * softcap

    def scaled_softcapped(z, *, scale, softcap):
        return torch.tanh(z * scale / softcap) * softcap

    references = []
    for logits, consts in ((plain, ()), (scaled, ("scale",)), (softcapped, ("softcap",)),
                           (scaled_softcapped, ("scale", "softcap"))):  # fmt: skip

        def without_bias(x, weight, target, _logits=logits, **numbers):
            return F.cross_entropy(_logits(F.linear(x, weight), **numbers), target)

        def with_bias(x, weight, bias, target, _logits=logits, **numbers):
            return F.cross_entropy(_logits(F.linear(x, weight, bias), **numbers), target)

        shapes = {"x": (6, 8), "weight": (10, 8)}
        variant = {"logits": logits.__name__}
        references.append(Reference(without_bias, {**shapes, "target": TARGET}, consts, variant))
        references.append(Reference(with_bias, {**shapes, "bias": (10,), "target": TARGET}, consts, variant))
    return tuple(references)


class LinearCrossEntropy(Pattern):
    name = "linear_cross_entropy"
    references = _references()
    rounded_inputs = True
    row_operators = True
    lazy = True

    def check(self, match: Match) -> str | None:
        x, weight, target = (match.meta(name) for name in ("x", "weight", "target"))
        if weight.ndim != 2 or not all(weight.static):
            return f"the head's weight has shape {list(weight.shape)}"
        if len({x.dtype, weight.dtype, *([match.meta("bias").dtype] if "bias" in match.tensors else [])}) > 1:
            if not match.rounded:
                return "input and head differ in dtype"
        if target.ndim > 1:
            return "the targets are not one per row"
        if _rows(match) is None:
            return "the rows of the logits are cut at places that change between calls"
        return None

    def replacement(self, match: Match) -> Call:
        reduction, ignore_index, smoothing = match.attrs("cross_entropy")
        kwargs = {
            "rows": _rows(match),
            "ignore_index": ignore_index,
            "reduction": REDUCTIONS[reduction],
            "label_smoothing": smoothing,
            "scale": match.consts.get("scale", 1.0),
            "softcap": match.consts.get("softcap"),
            "matmul_dtype": next(iter(match.rounded.values()), None),
            "out_dtype": match.root.meta.dtype,
        }
        bias = match["bias"] if "bias" in match.tensors else None
        note = {k: v for k, v in kwargs.items() if k in ("reduction", "softcap", "scale") and v not in (None, 1.0)}
        return Call(head_and_loss, (match["x"], match["weight"], match["target"], bias), kwargs, note)

    def sample(self, match: Match, name: str, shapes, generator: torch.Generator) -> torch.Tensor | None:
        shape, device = shapes[name], generator.device
        if name == "weight":
            return torch.randn(shape, generator=generator, device=device) / shape[-1] ** 0.5
        if name != "target":
            return None
        target = torch.randint(0, shapes["weight"][0], shape, generator=generator, device=device)
        ignored = torch.rand(shape, generator=generator, device=device) < 0.2
        return target.masked_fill(ignored, match.attrs("cross_entropy")[1]) if target.numel() > 1 else target


def _rows(match: Match) -> tuple[tuple[int, int, int, int], ...] | None:
    """The slices (dim, start, end, step) between head and loss, outermost dimension names kept; None if unknown."""
    path: list[Value] = []
    for _, _, values in reversed(match.passed):
        path += [v for v in reversed(values) if is_row_operator(v)]
    cuts = []
    for i, value in enumerate(path):
        if value.op == "reshape":
            if i != len(path) - 1 or value.meta.ndim != 2:
                return None  # rows regrouped before another cut
            continue
        numbers = list(value.node.args[1:])
        defaults = [0, None, None, 1]
        dim, start, end, step = (*numbers, *defaults[len(numbers) :])
        if not all(isinstance(n, int) or n is None for n in (dim, start, end, step)):
            return None
        cuts.append((dim, start, end, step))
    return tuple(cuts)


def head_and_loss(x, weight, target, bias, *, rows, **options):
    """The kernel on the rows that the model's loss looks at."""
    for dim, start, end, step in rows:
        x = torch.ops.aten.slice.Tensor(x, dim, start, end, step)
    return kernel(x, weight, target, bias=bias, **options)


PATTERN = LinearCrossEntropy()
