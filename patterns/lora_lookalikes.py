"""What looks like an adapter of a frozen layer and stays as it is, and why: near misses of the pattern `lora`."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch.nn import functional as F

from rewriter.canonical import TRANSPARENT
from rewriter.pattern import Match, Reference
from rewriter.patterns.lora_forms import BIAS, DOWN, UP, WEIGHT, X, branch
from rewriter.shadow import Value

IDS = torch.zeros(3, dtype=torch.int64)
NORMS, PRODUCTS = {"sqrt", "rsqrt"}, ("linear", "matmul")
MOST_STEPS = 40  # looked back along what a factor is made of


def _multiplied(gain, z, down, up, *, after):
    return gain * branch(z, down, up) * after


def _around_something(x, weight, h, up, *, after):
    return F.linear(x, weight) + F.linear(h, up) * after


def _around_something_with_bias(x, weight, bias, h, up, *, after):
    return F.linear(x, weight, bias) + F.linear(h, up) * after


def _of_a_part(y, z, down, up, *, after):
    return y + branch(z, down, up, after=after)


def _of_joined_parts(y, *parts, after):
    return y + torch.cat(parts, -1) * after


def _of_an_embedding(ids, weight, down, up, *, after):
    return F.embedding(ids, weight) + F.linear(F.embedding(ids, down), up) * after


def _of_a_convolution(x, weight, *rest, after):
    *bias, z, down, up = rest
    product = F.conv2d if x.dim() == 4 else F.conv1d
    return product(x, weight, *bias) + product(product(z, down), up) * after


def _rescaled(x, weight, *rest):
    *bias, gain = rest
    return F.linear(x, weight, *bias) * gain


def _is_frozen(match: Match, name: str = "weight") -> bool:
    return not match.meta(name).requires_grad


def _is_frozen_value(value: Value) -> bool:
    return value.meta is not None and not value.meta.requires_grad


def _narrow(match: Match) -> bool:
    rank = match.meta("up").shape[-1]
    return match.meta("up").ndim == 2 and 2 * rank <= min(match.meta("up").shape[0], match.meta("weight").shape[-1])


def _between_matrices(match: Match) -> str | None:
    value, seen = match.tensors["h"], []
    while value.op not in PRODUCTS and value.inputs and len(seen) < 4:
        if value.op not in TRANSPARENT:
            seen.append(value.op.removeprefix("opaque:"))
        value = max(value.inputs, key=lambda v: v.meta.numel() if v.meta else 0)
    if value.op not in PRODUCTS or not seen or not _is_frozen(match) or not _narrow(match):
        return None
    return f"{seen[0]} stands between the two matrices of the adapter"


def _by_what(match: Match) -> str | None:
    """Whether the factor, one number for each feature, is made of norms, or of the adapter itself."""
    scaled = any(user.op == "mul" and any(v.op == "const" for v in user.inputs) for user in match.root.users)
    if match.meta("gain").numel() != match.root.meta.shape[-1] or scaled:  # if scaled, that is the whole of it
        return None
    seen, todo = set(), [match.tensors["gain"]]
    while todo and len(seen) < MOST_STEPS:
        value = todo.pop()
        if value.op in NORMS or value.number == match.tensors["up"].number:
            return "the adapter is weight-decomposed: norms of the weight with the adapter in it scale both"
        if value.number not in seen:
            seen.add(value.number)
            todo.extend(value.inputs)
    return None


def _what_it_is_added_to(match: Match) -> str | None:
    value = _plain(match.tensors["y"])
    if value.op == "slice" and _plain(value.inputs[0]).op in (*PRODUCTS, "add"):
        return "the adapter is added to a part of what its layer gives"
    while value.op == "opaque:getitem":
        value = value.inputs[0]
    if "autograd_function" in value.op or "::" in value.op:
        return f"the layer's own product is made by {value.op.removeprefix('opaque:')}"
    layers = [v for v in map(_plain, value.inputs) if v.op == "linear"] if value.op == "add" else []
    if len(layers) == 1 and _is_frozen_value(layers[0].inputs[1]):
        return "something else is added to what the layer gives before the adapter is"
    return None


def _what_is_joined(match: Match) -> str | None:
    layer = _plain(match.tensors["y"])
    parts = [_plain(match.tensors[name]) for name in match.reference.inputs if name != "y"]
    factors = [[v for v in part.inputs if v.op != "const"][0] if part.op == "mul" else part for part in parts]
    of_two = any(f.op in PRODUCTS and _plain(f.inputs[0]).op in PRODUCTS for f in map(_plain, factors))
    if not of_two or layer.op not in PRODUCTS or not _is_frozen_value(layer.inputs[1]):
        return None
    return "each adapter is added to a part of what its layer gives"


def _plain(value: Value) -> Value:
    while value.op in TRANSPARENT or value.op == "reshape":
        value = value.inputs[0]
    return value


def _is_trained_vector(match: Match) -> str | None:
    gain = match.meta("gain")
    if not _is_frozen(match) or not gain.requires_grad or _plain(match.tensors["gain"]).op != "input":
        return None
    if gain.numel() != match.root.meta.shape[-1]:
        return None
    return "what the layer gives is multiplied by trained numbers: no matrices to add"


def _convolution(ndim: int, bias: bool) -> dict:
    image, one = (2, 8, *[5] * ndim), (1,) * ndim
    own = {"bias": BIAS} if bias else {}
    return {"x": image, "weight": (*WEIGHT, *one), **own, "z": image, "down": (*DOWN, *one), "up": (*UP, *one)}


# (spelling, examples of its tensors, why it stays: None where it is something else)
_ROWS: tuple[tuple[Callable, dict, Callable[[Match], str | None]], ...] = (
    (_multiplied, {"gain": BIAS, "z": X, "down": DOWN, "up": UP}, _by_what),
    (_around_something, {"x": X, "weight": WEIGHT, "h": (3, 2), "up": UP}, _between_matrices),
    (_around_something_with_bias, {"x": X, "weight": WEIGHT, "bias": BIAS, "h": (3, 2), "up": UP}, _between_matrices),
    (_of_a_part, {"y": (3, 12), "z": X, "down": DOWN, "up": UP}, _what_it_is_added_to),
    *((_of_joined_parts, {"y": (3, 12), **{f"part{i}": (3, 12 // count) for i in range(count)}}, _what_is_joined)
      for count in (2, 3)),
    (_of_an_embedding, {"ids": IDS, "weight": (20, 12), "down": (20, 2), "up": UP},
     lambda m: "the adapter is one of an embedding, which is no product" if _is_frozen(m) else None),
    *((_of_a_convolution, _convolution(ndim, bias),
       lambda m: "the adapter is one of a convolution" if _is_frozen(m) else None)
      for ndim in (1, 2) for bias in (False, True)),
    (_rescaled, {"x": X, "weight": WEIGHT, "gain": BIAS}, _is_trained_vector),
    (_rescaled, {"x": X, "weight": WEIGHT, "bias": BIAS, "gain": BIAS}, _is_trained_vector),
)  # fmt: skip


def _lookalike(fn: Callable, inputs: dict, why: Callable) -> Reference:
    numbers = ("after",) if "after" in inspect.signature(fn).parameters else ()
    return Reference(fn, inputs, numbers, {"why": why}, None, numbers)


LOOKALIKES = tuple(_lookalike(*row) for row in _ROWS)


def why_not(match: Match) -> str | None:
    return match.variant["why"](match)
