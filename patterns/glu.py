"""Gated linear unit: `activation(gate) * up` (Shazeer, "GLU Variants Improve Transformer", 2020).

The halves may be two tensors, the two halves of one, or its even and odd features; the kernel saves only its inputs.
Also with both clamped and up shifted by one, `min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clamp(up) + 1)`.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from rewriter.kernels.glu import glu, glu_packed
from rewriter.pattern import Call, Match, Pattern, Reference
from rewriter.shadow import Value

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": F.mish,
    "elu": F.elu,
    "softplus": F.softplus,
    "leaky_relu": F.leaky_relu,
}
SHAPES = {"gate": (3, 8), "up": (3, 8)}


def swish(x, alpha):
    return x * torch.sigmoid(x * alpha)


def _plain(name: str) -> Reference:
    activation = ACTIVATIONS[name]

    def gated(gate, up):
        return activation(gate) * up

    return Reference(gated, SHAPES, variant={"activation": name})


def with_alpha(gate, up, *, alpha):
    return swish(gate, alpha) * up


def shifted(gate, up, *, shift):
    return F.silu(gate) * (up + shift)


def shifted_with_alpha(gate, up, *, alpha, shift):
    return swish(gate, alpha) * (up + shift)


def clamped(gate, up, *, limit):
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def clamped_with_alpha(gate, up, *, limit, alpha):
    return swish(gate.clamp(max=limit), alpha) * up.clamp(-limit, limit)


def clamped_and_shifted(gate, up, *, limit, shift):
    return F.silu(gate.clamp(max=limit)) * (up.clamp(-limit, limit) + shift)


def clamped_and_shifted_with_alpha(gate, up, *, limit, alpha, shift):
    return swish(gate.clamp(max=limit), alpha) * (up.clamp(-limit, limit) + shift)


def of_library(x):
    return F.glu(x, -1)


def _silu(fn, *consts: str) -> Reference:
    return Reference(fn, SHAPES, consts, {"activation": "silu"})


class GLU(Pattern):
    name = "glu"
    references = (
        _silu(clamped_and_shifted_with_alpha, "limit", "alpha", "shift"),
        _silu(clamped_and_shifted, "limit", "shift"),
        _silu(clamped_with_alpha, "limit", "alpha"),
        _silu(clamped, "limit"),
        _silu(shifted_with_alpha, "alpha", "shift"),
        _silu(shifted, "shift"),
        _silu(with_alpha, "alpha"),
        *(_plain(name) for name in ACTIVATIONS),
        Reference(of_library, {"x": (3, 8)}, variant={"activation": "sigmoid"}),
    )

    def check(self, match: Match) -> str | None:
        if "x" in match.tensors:
            return None if match.meta("x").static[-1] else "the last dimension changes between calls"
        gate, up = match.meta("gate"), match.meta("up")
        if gate.shape != up.shape or gate.static != up.static:
            return f"gate {list(gate.shape)} and up {list(up.shape)} differ in shape"
        if not gate.ndim or not gate.static[-1]:
            return "the last dimension changes between calls"
        return None

    def replacement(self, match: Match) -> Call:
        options = {"activation": match.variant["activation"], **match.consts}
        if "x" in match.tensors:
            return Call(glu_packed, (match["x"],), options | {"gate_first": False}, options | {"packed": True})
        halves = _halves(match.tensors["gate"], match.tensors["up"])
        if halves is not None:
            whole, order = halves
            return Call(glu_packed, (whole.node,), options | order, options | {"packed": True})
        order, own = (match.root.meta.order(), match.meta("gate").order())
        layout = {} if order == own else {"order": order}
        return Call(glu_of_two, (match["gate"], match["up"]), options | layout, options)


def glu_of_two(gate, up, *, order=None, **options):
    """The kernel's result is laid out as the gate; `order`, outermost dimension first, is how the model has it."""
    y = glu(gate, up, **options)
    return y if order is None else y.permute(order).contiguous().permute([order.index(d) for d in range(y.dim())])


def _halves(gate: Value, up: Value) -> tuple[Value, dict[str, bool]] | None:
    """The tensor whose halves or whose even and odd features gate and up are, and in which order."""
    if gate.op != "slice" or up.op != "slice" or gate.inputs[0].number != up.inputs[0].number:
        return None
    whole = gate.inputs[0]
    if whole.node is None or whole.meta is None or whole.meta.shape[-1] % 2:
        return None
    spans = (gate.attrs, up.attrs)
    for interleaved, ends in (
        (False, ((-1, 0, 0.5, 1), (-1, 0.5, 1, 1))),
        (True, ((-1, "every", 2, 0), (-1, "every", 2, 1))),
    ):
        if spans in (ends, ends[::-1]):
            return whole, {"gate_first": spans == ends, "interleaved": interleaved}
    return None


PATTERN = GLU()
