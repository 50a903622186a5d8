"""Rotary position embedding (Su et al., "RoFormer", 2021): rotate pairs of features by an angle per position.

A pair is (i, i + d/2) ("half") or (2i, 2i + 1) ("interleaved"). Models write it with a rotated copy of the features,
half by half, or as a product of complex numbers, in one direction of rotation or the other. Query and key that share
their angles become one call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from rewriter.kernels.rotary import rotary as kernel
from rewriter.pattern import Call, Match, Pattern, Reference

X, ANGLE, HALF_ANGLE = (2, 4, 3, 8), (2, 1, 3, 8), (2, 1, 3, 4)


def halves(x):
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def pairs(x):
    return x[..., 0::2], x[..., 1::2]


def join_halves(a, b):
    return torch.cat((a, b), -1)


def join_pairs(a, b):
    return torch.stack((a, b), -1).flatten(-2)


# How features become pairs, and pairs features again; some models do one in this way and the other in that.
LAYOUTS = {"half": (halves, join_halves), "interleaved": (pairs, join_pairs)}
# How a reference's angles come: "whole", one for every feature; "signed", whole with the sign of the rotation in sin;
# "half", one for every pair; "complex", one complex number for every pair.


def _whole(split, join) -> dict[str, Callable]:
    def forward(x, cos, sin):
        a, b = split(x)
        return x * cos + join(-b, a) * sin

    def backward(x, cos, sin):
        a, b = split(x)
        return x * cos - join(-b, a) * sin

    def backward_by_sign(x, cos, sin):
        a, b = split(x)
        return x * cos + join(b, -a) * sin

    def signed(x, cos, sin):
        a, b = split(x)
        return x * cos + join(b, a) * sin

    def scaled(x, cos, sin, *, gain):
        a, b = split(x)
        return x * cos * gain + join(-b, a) * sin * gain

    return {"forward": forward, "backward": backward, "backward by sign": backward_by_sign, "signed": signed,
            "scaled": scaled}  # fmt: skip


def _apart(split, join) -> dict[str, Callable]:
    def forward(x, cos, sin):
        a, b = split(x)
        return join(a * cos - b * sin, b * cos + a * sin)

    def backward(x, cos, sin):
        a, b = split(x)
        return join(a * cos + b * sin, b * cos - a * sin)

    return {"forward": forward, "backward": backward}


def _complex(split, join) -> Callable:
    def forward(x, angle):
        product = torch.complex(*split(x)) * angle
        return join(product.real, product.imag)

    return forward


def _references() -> tuple[Reference, ...]:
    references = []
    angle = torch.ones(HALF_ANGLE, dtype=torch.complex64)
    for style, (split, join) in LAYOUTS.items():
        for name, fn in _whole(split, join).items():
            variant = {"style": style, "angles": "signed" if name == "signed" else "whole", "inverse": "back" in name}
            consts = ("gain",) if name == "scaled" else ()
            references.append(Reference(fn, {"x": X, "cos": ANGLE, "sin": ANGLE}, consts, variant))
        for out_style, (_, out_join) in LAYOUTS.items():
            form = {"style": style, "out_style": out_style}
            for name, fn in _apart(split, out_join).items():
                variant = {**form, "angles": "half", "inverse": name == "backward"}
                references.append(Reference(fn, {"x": X, "cos": HALF_ANGLE, "sin": HALF_ANGLE}, variant=variant))
            variant = {**form, "angles": "complex", "inverse": False}
            references.append(Reference(_complex(split, out_join), {"x": X, "angle": angle}, variant=variant))
    return tuple(references)


class Rotary(Pattern):
    name = "rotary"
    references = _references()

    def check(self, match: Match) -> str | None:
        x = match.meta("x")
        if not x.ndim or x.shape[-1] % 2 or not x.static[-1]:
            return "the rotated dimension is odd or changes between calls"
        width = x.shape[-1] // 2 if match.variant["angles"] in ("half", "complex") else x.shape[-1]
        for name in _angles(match):
            angle = match.meta(name)
            if not angle.ndim or angle.shape[-1] != width or angle.ndim > x.ndim:
                return f"{name} has shape {list(angle.shape)}, which isn't one angle for each of {width} features"
            if angle.dtype.is_complex and angle.requires_grad:
                return "its complex angles are trained"
        return None

    def group(self, matches: list[Match]) -> list[tuple[Match, ...]]:
        groups = defaultdict(list)
        for match in matches:
            angles = tuple(match.tensors[name].number for name in _angles(match))
            x, module = match.meta("x"), tuple(match.output.meta.get("nn_module_stack") or ())
            groups[
                angles, match.reference, *match.consts.values(), x.ndim, x.dtype, match.root.meta.dtype, module
            ].append(match)
        joined = []
        for group in groups.values():
            joined += [tuple(group[i : i + 2]) for i in range(0, len(group), 2)]
        return joined

    def replacement(self, *matches: Match) -> Call:
        first = matches[0]
        options = dict(first.variant) | {"out_dtype": first.root.meta.dtype} | first.consts
        options["contiguous"] = all(match.root.meta.is_contiguous() for match in matches)
        note = {"style": first.variant["style"], "tensors": len(matches)}
        angles = [first[name] for name in _angles(first)]
        if len(matches) == 1:
            return Call(rotate_one, (first["x"], *angles), options, note)
        return Call(rotate_pair, (first["x"], matches[1]["x"], *angles), options, note)


def _angles(match: Match) -> tuple[str, ...]:
    return ("angle",) if match.variant["angles"] == "complex" else ("cos", "sin")


def rotate_pair(q, k, *angles, style, out_dtype, contiguous, out_style=None, **form):
    layout = {"interleaved": style == "interleaved", "out_interleaved": (out_style or style) == "interleaved"}
    return kernel(q, k, *_tables(angles, style, **form), out_dtype=out_dtype, contiguous=contiguous, **layout)


def rotate_one(x, *angles, **form):
    return rotate_pair(x, None, *angles, **form)[0]


def _tables(given, style, *, angles, inverse, gain=1.0):
    """cos and sin for every feature, with the sign of sin as the kernel has it."""
    _, join = LAYOUTS[style]
    cos, sin = (given[0].real, given[0].imag) if angles == "complex" else given
    if angles in ("half", "complex"):
        cos, sin = join(cos, cos), join(sin, sin)
    if angles == "signed":
        first, second = LAYOUTS[style][0](sin)
        sin = join(-first, second)
    if gain != 1.0:
        cos, sin = cos * gain, sin * gain
    return cos, -sin if inverse else sin


PATTERN = Rotary()
