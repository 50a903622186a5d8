"""Linear head and cross entropy in one: `cross_entropy(softcap(scale * (x @ weight.T + bias)), target)`.

The logits are never held: the kernel works on chunks of tokens. Where the model also returns its logits, they leave as
a tensor that is computed on demand. Slices and reshapes of rows between the two (the shift by one position, the
flattening) act on `x` instead, since the head treats every row by itself. The head may have low-rank adapters, or be in
4 bits (adapted_head.py).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from rewriter.kernels.linear_cross_entropy import linear_cross_entropy as kernel
from rewriter.meta import TensorMeta
from rewriter.pattern import Call, Match, Pattern, Reference
from rewriter.patterns import adapted_head
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
from rewriter.patterns.lora import weight_of
from rewriter.shadow import Value, is_row_operator
from rewriter.sizes import shorter

# How the head is written: (function of x, weight and maybe bias, examples of the latter two).
HEADS = (
    (F.linear, {"weight": (CLASSES, 8)}),
    (F.linear, {"weight": (CLASSES, 8), "bias": (CLASSES,)}),
    (torch.matmul, {"weight": (8, CLASSES)}),
)


# What may be done to the logits by a tensor, such as a learned temperature: name of the tensor -> function.
FACTORS = {"": lambda z: z, "factor": lambda z, factor: z * factor, "divisor": lambda z, divisor: z / divisor}


def _references() -> tuple[Reference, ...]:
    """Of each loss with each plain head, and with logits that any other head makes (see `within`)."""
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
            references.append(base)
            for factor in [f for f in FACTORS if f and transform is plain and not base.consts]:

                def of_logits(logits, *rest, _loss=base.fn, _factor=factor):
                    return _loss(FACTORS[_factor](logits, rest[0]), *rest[1:])

                inputs = {"logits": (6, CLASSES), factor: (), **targets}
                references.append(Reference(of_logits, inputs, (), {"loss": loss, "factor": factor}, base))
    return tuple(references)


class LinearCrossEntropy(Pattern):
    name = "linear_cross_entropy"
    references = _references()
    rounded_inputs = True
    row_operators = True
    lazy = True
    rows = "x"
    within = {"logits": adapted_head.HEADS}

    def library(self, match: Match) -> str | None:
        return adapted_head.library(match.inner["logits"]) if match.inner else None

    def rounds_once(self, match: Match) -> bool:
        return bool(match.inner)  # an adapter may be in float32 beside logits in 16 bits

    def row_input(self, match: Match):
        if not match.inner:
            return super().row_input(match)
        parts = adapted_head.parts(match.inner["logits"])
        return parts.x.node if parts.z is None else None

    def check(self, match: Match) -> str | None:
        reason = adapted_head.why_not(match.inner["logits"]) if match.inner else _plain_misfit(match)
        if reason is not None:
            return reason
        if _rows(match) is None:
            return "the rows of the logits are cut at places that change between calls"
        factor = match.variant.get("factor")
        if factor and match.meta(factor).numel() != 1:
            return f"the logits are scaled by a tensor of shape {list(match.meta(factor).shape)}"
        return loss_check(match)

    def replacement(self, match: Match) -> Call:
        kwargs, factor = loss_options(match), match.variant.get("factor")
        form = {"rows": _rows(match), "loss": match.variant["loss"]} | ({factor: match[factor]} if factor else {})
        bias, class_weight = (match[n] if n in match.tensors else None for n in ("bias", "class_weight"))
        if match.inner:
            parts = adapted_head.parts(match.inner["logits"])
            arguments = parts.x.node, parts.z and parts.z.node, match["target"], class_weight
            return Call(
                adapted_head_and_loss,
                arguments,
                {**kwargs, **form, **parts.tensors, **parts.options},
                {**loss_note(kwargs), **parts.note},
            )
        kwargs["matmul_dtype"] = next(iter(match.rounded.values()), None)
        arguments = (match["x"], match["weight"], match["target"], bias, class_weight)
        form["transposed"] = match.variant["transposed"]
        return Call(head_and_loss, arguments, {**kwargs, **form}, loss_note(kwargs))

    def cut(self, match: Match, longest: int) -> dict[int, int] | None:
        """Of a head in 4 bits, rows alone: its operators rely on the sizes of what they are given."""
        if "packed" not in match.tensors:
            return None
        x = adapted_head.parts(match.inner["logits"]).x.meta
        others = {s for name, v in match.tensors.items() if name[0] not in "xzt" for s in v.meta.shape}
        return shorter(x.shape, longest, {x.shape[-1], *weight_of(match.inner["logits"]).shape, *others})

    def sample(self, match: Match, name: str, shapes, generator: torch.Generator) -> torch.Tensor | None:
        if match.inner:
            head = match.inner["logits"]
            given = adapted_head.sample(head, name, shapes, generator)
            if given is not None or name not in ("target", "class_weight"):
                return given
            return loss_sample(match, name, shapes[name], adapted_head.classes_of(head, shapes), generator)
        shape, out = shapes["weight"], -1 if match.variant["transposed"] else 0
        if name == "weight":
            return (
                torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
                / shape[-1 - out] ** 0.5
            )
        return loss_sample(match, name, shapes[name], shape[out], generator)


def _plain_misfit(match: Match) -> str | None:
    weight: TensorMeta = match.meta("weight")
    if weight.ndim != 2 or not all(weight.static):
        return f"the head's weight has shape {list(weight.shape)}"
    dtypes = {match.meta(name).dtype for name in ("x", "weight", "bias") if name in match.tensors}
    return "input and head differ in dtype" if len(dtypes) > 1 and not match.rounded else None


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
    x, weight, target, bias, class_weight, *, rows, loss, transposed, factor=None, divisor=None, u=None, **options
):
    """The kernel on the rows that the model's loss looks at; one number that scales the logits scales x, u and bias."""
    if divisor is not None:
        factor = 1 / divisor
    if factor is not None:
        x = x * factor.to(x.dtype).reshape(())
        bias, u = (t if t is None else t * factor.to(t.dtype).reshape(()) for t in (bias, u))
    for dim, start, end, step in rows:
        x, u = (t if t is None else torch.ops.aten.slice.Tensor(t, dim, start, end, step) for t in (x, u))
    weight = weight.t() if transposed else weight
    index = classes(target, loss, weight.shape[0])
    losses = kernel(x, weight, index, bias=bias, class_weight=class_weight, u=u, **options)
    return finished(losses, target, loss)


def adapted_head_and_loss(
    x, z, target, class_weight, *, weight, layer, scales, by_columns, transposed, adapter_dtype, **options
):
    """The same for a head with adapters, whose input is z if that is not x, or in 4 bits."""
    seen = x if z is None else z
    bias, u, up = adapted_head.first_product(seen, layer, scales, transposed, adapter_dtype)
    return head_and_loss(x, weight, target, bias, class_weight, transposed=by_columns, u=u, up=up, **options)


PATTERN = LinearCrossEntropy()
