"""Cross entropy of logits that are there anyway: `cross_entropy(softcap(scale * logits), target)` in any spelling.

Where the logits come from a linear head that nothing else reads, linear_cross_entropy takes the place of both. The
spellings here serve it too: the loss of a batch, or the logarithm of the target's probability, token by token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from rewriter.kernels.cross_entropy import cross_entropy as kernel
from rewriter.pattern import Call, Match, Pattern, Reference

REDUCTIONS = ("none", "mean", "sum")  # ATen's order
CLASSES = 10
TARGET, INDEX = torch.zeros(6, dtype=torch.int64), torch.zeros(6, 1, dtype=torch.int64)


def plain(z):
    return z


def scaled(z, *, scale):
    return z * scale


def softcapped(z, *, softcap):
    return torch.tanh(z / softcap) * softcap


def scaled_softcapped(z, *, scale, softcap):
    return torch.tanh(z * scale / softcap) * softcap


def _by_rows(z, target):
    return F.log_softmax(z, -1)[torch.arange(6), target]


# What may be done to the logits first: function -> names of its constants.
TRANSFORMS: dict[Callable, tuple[str, ...]] = {
    plain: (), scaled: ("scale",), softcapped: ("softcap",), scaled_softcapped: ("scale", "softcap"),
}  # fmt: skip
# How the loss is written: (name, function of logits, target and maybe class weights, examples of the latter two).
LOSSES: tuple[tuple[str, Callable, dict], ...] = (
    ("cross_entropy", lambda z, target, weight: F.cross_entropy(z, target, weight),
     {"target": TARGET, "class_weight": (CLASSES,)}),
    ("cross_entropy", lambda z, target: F.cross_entropy(z, target), {"target": TARGET}),
    ("log_probability", lambda z, target: F.log_softmax(z, -1).gather(-1, target), {"target": INDEX}),
    ("log_probability, by rows", _by_rows, {"target": TARGET}),
    ("token_loss", lambda z, target: z.logsumexp(-1) - z.gather(-1, target).squeeze(-1), {"target": INDEX}),
)  # fmt: skip


def loss_check(match: Match) -> str | None:
    """Why this loss can't be computed by a kernel, or None."""
    if match.variant["loss"] != "cross_entropy":
        return None
    logits, target = match.bound_operator("cross_entropy").inputs[:2]
    if logits.meta is None or logits.meta.shape[:-1] != target.meta.shape:
        return "the targets are not one per row"
    if "class_weight" in match.tensors and match.meta("class_weight").requires_grad:
        return "its class weights are trained"
    return None


def loss_options(match: Match) -> dict:
    """Keyword arguments of `finished`, and of the kernels, for a match of any of the spellings."""
    loss = match.variant["loss"]
    reduction, ignore_index, smoothing = match.attrs("cross_entropy") if loss == "cross_entropy" else (0, -100, 0.0)
    return {
        "ignore_index": ignore_index,
        "reduction": REDUCTIONS[reduction],
        "label_smoothing": smoothing,
        "scale": match.consts.get("scale", 1.0),
        "softcap": match.consts.get("softcap"),
        "out_dtype": match.root.meta.dtype,
    }


def loss_note(kwargs: dict) -> dict:
    return {k: v for k, v in kwargs.items() if k in ("reduction", "softcap", "scale") and v not in (None, 1.0)}


def finished(losses, target, loss: str):
    """The kernel's losses as the model wants them."""
    if losses.dim() == 0:
        return losses
    losses = losses.view(target.shape)
    if loss == "token_loss":
        return losses.squeeze(-1)
    return losses if loss == "cross_entropy" else -losses


def classes(target, loss: str, count: int):
    """Targets as class numbers; an index may count from the end."""
    return torch.where(target < 0, target + count, target) if loss == "log_probability, by rows" else target


def loss_sample(match: Match, name: str, shape, count: int, generator: torch.Generator) -> torch.Tensor | None:
    """Class numbers, a few of them ignored where the spelling can ignore; positive class weights."""
    if name == "class_weight":
        return torch.rand(shape, generator=generator, device=generator.device) + 0.5
    if name != "target":
        return None
    target = torch.randint(0, count, shape, generator=generator, device=generator.device)
    if match.variant["loss"] != "cross_entropy" or target.numel() < 2:
        return target
    ignored = torch.rand(shape, generator=generator, device=generator.device) < 0.2
    return target.masked_fill(ignored, match.attrs("cross_entropy")[1])


def _references() -> tuple[Reference, ...]:
    references, bases = [], {}
    for transform, consts in TRANSFORMS.items():
        for loss, fn, inputs in LOSSES:

            def reference(logits, *rest, _fn=fn, _transform=transform, **numbers):
                return _fn(_transform(logits, **numbers), *rest)

            variant, examples = {"loss": loss}, {"logits": (6, CLASSES), **inputs}
            references.append(Reference(reference, examples, consts, variant, bases.get(fn)))
            bases.setdefault(fn, references[-1])
    return tuple(references)


class CrossEntropy(Pattern):
    name = "cross_entropy"
    references = _references()

    def check(self, match: Match) -> str | None:
        logits = match.meta("logits")
        if not logits.ndim or not logits.static[-1]:
            return "the number of classes changes between calls"
        return loss_check(match)

    def replacement(self, match: Match) -> Call:
        kwargs = loss_options(match)
        weight = match["class_weight"] if "class_weight" in match.tensors else None
        arguments = (match["logits"], match["target"], weight)
        return Call(fused_cross_entropy, arguments, {**kwargs, "loss": match.variant["loss"]}, loss_note(kwargs))

    def sample(self, match: Match, name: str, shapes, generator: torch.Generator) -> torch.Tensor | None:
        return loss_sample(match, name, shapes[name], shapes["logits"][-1], generator)


def fused_cross_entropy(logits, target, weight, *, loss, **options):
    index = classes(target, loss, logits.shape[-1])
    return finished(kernel(logits, index, weight=weight, **options), target, loss)


PATTERN = CrossEntropy()
