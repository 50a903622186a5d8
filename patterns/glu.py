"""Gated linear unit: `activation(gate) * up` (Shazeer, "GLU Variants Improve Transformer", 2020).

The halves may be two tensors or the two halves of one; the kernel saves only its inputs.
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
}


def _reference(name: str) -> Reference:
    activation = ACTIVATIONS[name]

    def gated(gate, up):
        return activation(gate) * up

    return Reference(gated, {"gate": (3, 8), "up": (3, 8)}, variant={"activation": name})


class GLU(Pattern):
    name = "glu"
    references = tuple(_reference(name) for name in ACTIVATIONS)

    def check(self, match: Match) -> str | None:
        gate, up = match.meta("gate"), match.meta("up")
        if gate.shape != up.shape or gate.static != up.static:
            return f"gate {list(gate.shape)} and up {list(up.shape)} differ in shape"
        if not gate.ndim or not gate.static[-1]:
            return "the last dimension changes between calls"
        return None

    def replacement(self, match: Match) -> Call:
        activation = match.variant["activation"]
        halves = _halves(match.tensors["gate"], match.tensors["up"])
        if halves is not None:
            whole, gate_first = halves
            note = {"activation": activation, "packed": True}
            return Call(glu_packed, (whole.node,), {"activation": activation, "gate_first": gate_first}, note)
        return Call(glu, (match["gate"], match["up"]), {"activation": activation}, {"activation": activation})


def _halves(gate: Value, up: Value) -> tuple[Value, bool] | None:
    """The tensor whose two halves along the last dimension gate and up are, and whether gate comes first."""
    if gate.op != "slice" or up.op != "slice" or gate.inputs[0].number != up.inputs[0].number:
        return None
    if gate.inputs[0].node is None or "dynamic" in gate.attrs or "dynamic" in up.attrs:
        return None
    spans = [value.attrs[:3] for value in (gate, up)]
    first, second = (-1, 0, 0.5), (-1, 0.5, 1)
    if any(value.attrs[3] != 1 for value in (gate, up)) or spans not in ([first, second], [second, first]):
        return None
    return gate.inputs[0], spans[0] == first


PATTERN = GLU()
