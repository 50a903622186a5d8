"""Rotary position embedding (Su et al., "RoFormer", 2021): rotate pairs of features by an angle per position.

`x * cos + rotate_half(x) * sin`, pairs being (i, i + d/2) ("half") or (2i, 2i + 1) ("interleaved"); also the spelling
that computes the two halves apart. Query and key that share cos and sin become one call.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from rewriter.kernels.rotary import rotary as kernel
from rewriter.pattern import Call, Match, Pattern, Reference

X, ANGLE, HALF_ANGLE = (2, 4, 3, 8), (2, 1, 3, 8), (2, 1, 3, 4)


def half(x, cos, sin):
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-b, a), -1) * sin


def halves_apart(x, cos, sin):
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def interleaved(x, cos, sin):
    rotated = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + rotated * sin


class Rotary(Pattern):
    name = "rotary"
    references = (
        Reference(half, {"x": X, "cos": ANGLE, "sin": ANGLE}, variant={"style": "half"}),
        Reference(
            halves_apart, {"x": X, "cos": HALF_ANGLE, "sin": HALF_ANGLE}, variant={"style": "half", "apart": True}
        ),
        Reference(interleaved, {"x": X, "cos": ANGLE, "sin": ANGLE}, variant={"style": "interleaved"}),
    )

    def check(self, match: Match) -> str | None:
        x, cos, sin = (match.meta(name) for name in ("x", "cos", "sin"))
        if not x.ndim or x.shape[-1] % 2 or not x.static[-1]:
            return "the rotated dimension is odd or changes between calls"
        width = x.shape[-1] // 2 if match.variant.get("apart") else x.shape[-1]
        for name, angle in (("cos", cos), ("sin", sin)):
            if not angle.ndim or angle.shape[-1] != width or angle.ndim > x.ndim:
                return f"{name} has shape {list(angle.shape)}, which isn't one angle for each of {width} features"
        return None

    def group(self, matches: list[Match]) -> list[tuple[Match, ...]]:
        groups = defaultdict(list)
        for match in matches:
            angles = match.tensors["cos"].number, match.tensors["sin"].number
            x, module = match.meta("x"), tuple(match.output.meta.get("nn_module_stack") or ())
            groups[angles, match.reference, x.ndim, x.dtype, module].append(match)
        pairs = []
        for group in groups.values():
            pairs += [tuple(group[i : i + 2]) for i in range(0, len(group), 2)]
        return pairs

    def replacement(self, *matches: Match) -> Call:
        first = matches[0]
        kwargs = {
            "interleaved": first.variant["style"] == "interleaved",
            "repeat_angles": bool(first.variant.get("apart")),
        }
        note = {"style": first.variant["style"], "tensors": len(matches)}
        if len(matches) == 1:
            return Call(rotate_one, (first["x"], first["cos"], first["sin"]), kwargs, note)
        return Call(rotate_pair, (first["x"], matches[1]["x"], first["cos"], first["sin"]), kwargs, note)


def rotate_pair(q, k, cos, sin, *, interleaved, repeat_angles):
    if repeat_angles:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    return kernel(q, k, cos, sin, interleaved=interleaved)


def rotate_one(x, cos, sin, *, interleaved, repeat_angles):
    if repeat_angles:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    return kernel(x, None, cos, sin, interleaved=interleaved)[0]


PATTERN = Rotary()
