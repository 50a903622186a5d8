"""Linear head and cross entropy in one: `cross_entropy(softcap(scale * (x @ weight.T + bias)), target)`.

The logits are never held: the kernel works on chunks of tokens. Where the model also returns its logits, they leave as
a tensor that is computed on demand. Slices and reshapes of rows between the two (the shift by one position, the
flattening) act on `x` instead, since the head treats every row by itself.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from rewriter.kernels.linear_cross_entropy import linear_cross_entropy as kernel
from rewriter.pattern import Call, Match, Pattern, Reference
from rewriter.patterns.cross_entropy import (
    CLASSES,
    LOSSES,
    TRANSFORMS,
    classes,
    finished,
    loss_check,
    loss_note,
    loss_options,
    loss_sample,
    plain,
)
from rewriter.patterns.cross_entropy import (
    PATTERN as cross_entropy,
)
from rewriter.shadow import Value, is_row_operator

# How the head is written: (function of x, weight and maybe bias, examples of the latter two).
HEADS = (
    (F.linear, {"weight": (CLASSES, 8)}),
    (F.linear, {"weight": (CLASSES, 8), "bias": (CLASSES,)}),
    (torch.matmul, {"weight": (8, CLASSES)}),
)


# What may be done to the logits by a tensor, such as a learned temperature: name of the tensor -> function.
FACTORS = {"": lambda z: z, "factor": lambda z, factor: z * factor, "divisor": lambda z, divisor: z / divisor}


def _references() -> tuple[Reference, ...]:
    references, without_head = [], iter(cross_entropy.references)
    for transform in TRANSFORMS:
        for loss, _, targets, _ in LOSSES:
            base = next(without_head)
            for head, weights in HEADS:
                for factor in FACTORS if transform is plain and not base.consts else ("",):

                    def reference(x, *rest, _head=head, _parts=weights, _loss=base.fn, _factor=factor, **numbers):
                        n, m = len(_parts), len(_parts) + bool(_factor)
                        return _loss(FACTORS[_factor](_head(x, *rest[:n]), *rest[n:m]), *rest[m:], **numbers)

                    variant = {"loss": loss, "transposed": head is torch.matmul, "factor": factor}
                    inputs = {"x": (6, 8), **weights, **({factor: ()} if factor else {}), **targets}
                    references.append(Reference(reference, inputs, base.consts, variant, base))
    return tuple(references)


class LinearCrossEntropy(Pattern):
    name = "linear_cross_entropy"
    references = _references()
    rounded_inputs = True
    row_operators = True
    lazy = True
    rows = "x"

    def check(self, match: Match) -> str | None:
        x, weight = match.meta("x"), match.meta("weight")
        if weight.ndim != 2 or not all(weight.static):
            return f"the head's weight has shape {list(weight.shape)}"
        if len({x.dtype, weight.dtype, *([match.meta("bias").dtype] if "bias" in match.tensors else [])}) > 1:
            if not match.rounded:
                return "input and head differ in dtype"
        if _rows(match) is None:
            return "the rows of the logits are cut at places that change between calls"
        factor = match.variant["factor"]
        if factor and match.meta(factor).numel() != 1:
            return f"the logits are scaled by a tensor of shape {list(match.meta(factor).shape)}"
        return loss_check(match)

    def replacement(self, match: Match) -> Call:
        kwargs = loss_options(match)
        kwargs["matmul_dtype"] = next(iter(match.rounded.values()), None)
        factor = match.variant["factor"]
        form = {"rows": _rows(match), "loss": match.variant["loss"], "transposed": match.variant["transposed"]}
        form |= {factor: match[factor]} if factor else {}
        bias, class_weight = (match[n] if n in match.tensors else None for n in ("bias", "class_weight"))
        arguments = (match["x"], match["weight"], match["target"], bias, class_weight)
        return Call(head_and_loss, arguments, {**kwargs, **form}, loss_note(kwargs))

    def sample(self, match: Match, name: str, shapes, generator: torch.Generator) -> torch.Tensor | None:
        shape, out = shapes["weight"], -1 if match.variant["transposed"] else 0
        if name == "weight":
            return torch.randn(shape, generator=generator, device=generator.device) / shape[-1 - out] ** 0.5
        return loss_sample(match, name, shapes[name], shape[out], generator)


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
        if value.attrs[-1] == "dynamic":
            dim, start, end, step, _ = value.attrs
            if value.node is None or not all(isinstance(a, int) or a is None for a in value.node.args[1:]):
                return None
            numbers = list(value.node.args[1:])
            dim, start, end, step = (*numbers, *[0, None, None, 1][len(numbers) :])
        elif value.attrs[1] == "every":
            dim, _, step, start = value.attrs
            end = None
        else:
            size = value.inputs[0].meta.shape[value.attrs[0]]
            dim, (start, end), step = value.attrs[0], (int(edge * size) for edge in value.attrs[1:3]), value.attrs[3]
        cuts.append((dim, start, end, step))
    return tuple(cuts)


def head_and_loss(
    x, weight, target, bias, class_weight, *, rows, loss, transposed, factor=None, divisor=None, **options
):
    """The kernel on the rows that the model's loss looks at; one number that scales the logits scales x and bias."""
    if divisor is not None:
        factor = 1 / divisor
    if factor is not None:
        x = x * factor.to(x.dtype).reshape(())
        bias = bias if bias is None else bias * factor.to(bias.dtype).reshape(())
    for dim, start, end, step in rows:
        x = torch.ops.aten.slice.Tensor(x, dim, start, end, step)
    weight = weight.t() if transposed else weight
    index = classes(target, loss, weight.shape[0])
    losses = kernel(x, weight, index, bias=bias, class_weight=class_weight, **options)
    return finished(losses, target, loss)


PATTERN = LinearCrossEntropy()
