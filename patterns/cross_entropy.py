"""Cross entropy of logits that are there anyway: `cross_entropy(softcap(scale * logits), target)` in any spelling.

Where the logits come from a linear head that nothing else reads, linear_cross_entropy takes the place of both. The
spellings here serve it too: the loss of a batch, or the logarithm of the target's probability, token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from rewriter.canonical.table import TRANSPARENT
from rewriter.kernels.cross_entropy import cross_entropy as kernel
from rewriter.pattern import Call, Match, Pattern, Reference
from rewriter.shadow import Value, is_row_operator

REDUCTIONS = ("none", "mean", "sum")  # ATen's order
CLASSES = 10
HEADS = ("linear", "matmul")
NEVER = -(2**31)  # no target: spellings that ignore none
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


def _smoothed(z, target, *, kept, spread):
    logs = F.log_softmax(z, -1)
    return kept * logs.gather(-1, target) + spread * logs.mean(-1, keepdim=True)


def _smoothed_squeezed(z, target, *, kept, spread):
    logs = F.log_softmax(z, -1)
    return kept * logs.gather(-1, target).squeeze(-1) + spread * logs.mean(-1)


SMOOTHING = ("kept", "spread")
# How the loss is written: (name, function of logits, target and maybe class weights, examples of the latter two, names
# of its constants).
LOSSES: tuple[tuple[str, Callable, dict, tuple], ...] = (
    ("cross_entropy", lambda z, target, weight: F.cross_entropy(z, target, weight),
     {"target": TARGET, "class_weight": (CLASSES,)}, ()),
    ("cross_entropy", lambda z, target: F.cross_entropy(z, target), {"target": TARGET}, ()),
    ("log_probability", lambda z, target: F.log_softmax(z, -1).gather(-1, target), {"target": INDEX}, ()),
    ("log_probability, by rows", _by_rows, {"target": TARGET}, ()),
    ("log_probability", _smoothed, {"target": INDEX}, SMOOTHING),
    ("negative token_loss", _smoothed_squeezed, {"target": INDEX}, SMOOTHING),
    ("negative log_probability", lambda *given, **numbers: -_smoothed(*given, **numbers), {"target": INDEX}, SMOOTHING),
    ("token_loss", lambda *given, **numbers: -_smoothed_squeezed(*given, **numbers), {"target": INDEX}, SMOOTHING),
    ("negative log_probability", lambda z, target: -F.log_softmax(z, -1).gather(-1, target), {"target": INDEX}, ()),
    ("negative log_probability, by rows", lambda z, target: -_by_rows(z, target), {"target": TARGET}, ()),
    ("token_loss", lambda z, target: z.logsumexp(-1) - z.gather(-1, target).squeeze(-1), {"target": INDEX}, ()),
    ("negative token_loss", lambda z, target: z.gather(-1, target).squeeze(-1) - z.logsumexp(-1), {"target": INDEX},
     ()),
)  # fmt: skip


def loss_check(match: Match) -> str | None:
    """Why this loss can't be computed by a kernel, or None."""
    if "kept" in match.consts and abs(match.consts["kept"] + match.consts["spread"] - 1) > 1e-6:
        return "its weights of the target and of all classes don't add up to 1"
    if match.variant["loss"] != "cross_entropy":
        return None
    logits, target = match.bound_operator("cross_entropy").inputs[:2]
    if None in (logits.meta, target.meta) or math.prod(logits.meta.shape[:-1]) != target.meta.numel():
        return "the targets are not one per row"
    if "class_weight" in match.tensors and match.meta("class_weight").requires_grad:
        return "its class weights are trained"
    return None


def loss_options(match: Match) -> dict:
    """Keyword arguments of `finished`, and of the kernels, for a match of any of the spellings."""
    loss = match.variant["loss"]
    if loss == "cross_entropy":
        reduction, ignore_index, smoothing, z_loss = match.attrs("cross_entropy")
    else:
        by_token = [value.attrs for value in match.bound.values() if value.op == "token_loss"]
        reduction, ignore_index, smoothing = 0, NEVER, match.consts.get("spread", 0.0)
        z_loss = by_token[0][0] if by_token and by_token[0] else 0.0
    return {
        "ignore_index": ignore_index,
        "reduction": REDUCTIONS[reduction],
        "label_smoothing": smoothing,
        "scale": match.consts.get("scale", 1.0),
        "softcap": match.consts.get("softcap"),
        "z_loss": z_loss,
        "out_dtype": match.root.meta.dtype,
    }


def loss_note(kwargs: dict) -> dict:
    plain = {"softcap": None, "scale": 1.0, "z_loss": 0.0}
    return {k: v for k, v in kwargs.items() if k == "reduction" or (k in plain and v != plain[k])}


def finished(losses, target, loss: str):
    """The kernel's losses as the model wants them."""
    if losses.dim() == 0:
        return losses
    losses = losses.view(target.shape)
    losses = losses.squeeze(-1) if loss.endswith("token_loss") else losses
    return -losses if loss.startswith("log_probability") or loss == "negative token_loss" else losses


def classes(target, loss: str, count: int):
    """Targets as class numbers; an index may count from the end."""
    return torch.where(target < 0, target + count, target) if loss.endswith("by rows") else target


def loss_sample(match: Match, name: str, shape, count: int, generator: torch.Generator) -> torch.Tensor | None:
    """Class numbers, a few of them ignored where the spelling can ignore; positive class weights."""
    if name == "class_weight":
        return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32) + 0.5
    if name != "target":
        return None
    target = torch.randint(0, count, shape, generator=generator, device=generator.device)
    if match.variant["loss"] != "cross_entropy" or target.numel() < 2:
        return target
    ignored = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32) < 0.2
    return target.masked_fill(ignored, match.attrs("cross_entropy")[1])


def _references() -> tuple[Reference, ...]:
    references, bases = [], {}
    for transform, consts in TRANSFORMS.items():
        for loss, fn, inputs, own in LOSSES:

            def reference(logits, *rest, _fn=fn, _transform=transform, _own=own, **numbers):
                of_loss = {name: numbers.pop(name) for name in _own}
                return _fn(_transform(logits, **numbers), *rest, **of_loss)

            variant, examples = {"loss": loss}, {"logits": (6, CLASSES), **inputs}
            references.append(Reference(reference, examples, (*consts, *own), variant, bases.get(fn)))
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
        note = {**loss_note(kwargs), **_why_logits(match.tensors["logits"])}
        return Call(fused_cross_entropy, arguments, {**kwargs, "loss": match.variant["loss"]}, note)

    def sample(self, match: Match, name: str, shapes, generator: torch.Generator) -> torch.Tensor | None:
        return loss_sample(match, name, shapes[name], shapes["logits"][-1], generator)


def _why_logits(value: Value) -> dict:
    """What makes the logits, where that is no head that linear_cross_entropy takes: why they are there at all."""
    while value.inputs and (value.op in (*TRANSPARENT, "opaque:getitem", "mul", "tanh") or is_row_operator(value)):
        value = max(value.inputs, key=lambda v: v.meta.numel() if v.meta else 0)
    if value.op in HEADS:
        return {"logits": "kept: a head in 4 bits"} if value.inputs[1].op == "dequantize_4bit" else {}
    if value.op == "add" and any(_is_product(v) for v in value.inputs):
        return {"logits": "kept: a sum of products"}
    if value.op == "input":
        return {"logits": "kept: they come into the graph"}
    return {"logits": f"kept: made by {value.op.removeprefix('opaque:')}"}


def _is_product(value: Value) -> bool:
    while value.op in TRANSPARENT or value.op in ("mul", "dropout"):
        value = value.inputs[0]
    return value.op in HEADS


def fused_cross_entropy(logits, target, weight, *, loss, **options):
    index = classes(target, loss, logits.shape[-1])
    return finished(kernel(logits, index, weight=weight, **options), target, loss)


PATTERN = CrossEntropy()
