"""How models write a linear layer with low-rank adapters: the references of the pattern `lora`.

The adapter is added to what the layer gives, or to its weight. A number may multiply its input, what lies between its
two matrices, or its result; all of these may be missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch.nn import functional as F

from rewriter.pattern import Reference
from rewriter.patterns import linear_4bit as four_bits

X, WEIGHT, BIAS, DOWN, UP = (3, 8), (12, 8), (12,), (2, 8), (12, 2)
MOST_ADAPTERS = 4  # of one layer
NUMBERS = ("before", "between", "after")
# What the weight is made of, and for those in 4 bits the layer alone, which every graph with one of them has.
WEIGHTS = {
    "matrix": ({"weight": WEIGHT}, None),
    "columns": ({"weight": WEIGHT[::-1]}, None),
    "4 bits": (four_bits.PLAIN, four_bits.PATTERN.references[0]),
    "4 bits, nested": (four_bits.NESTED, four_bits.PATTERN.references[2]),
}


def base(x, weight, *bias, by_columns=False):
    """The layer's own product."""
    if not by_columns:
        return F.linear(x, weight, *bias)
    return torch.matmul(x, weight) + bias[0] if bias else torch.matmul(x, weight)


def branch(z, down, up, *up_bias, transposed=False, before=1.0, between=1.0, after=1.0):
    if transposed:
        return torch.matmul(torch.matmul(z * before, down) * between, up) * after
    return F.linear(F.linear(z * before, down) * between, up, *up_bias) * after


def _layer(x, rest, weights: str, bias: bool) -> tuple:
    """The layer's result, and the tensors that are not its own."""
    parts, whole = WEIGHTS[weights]
    tensors, rest = rest[: len(parts)], rest[len(parts) :]
    own, rest = (rest[:1], rest[1:]) if bias else ((), rest)
    weight = tensors[0] if whole is None else four_bits.example_weight(tensors)
    return base(x, weight, *own, by_columns=weights == "columns"), rest


def _examples(bias: bool, weights: str = "matrix") -> dict:
    return {"x": X, **WEIGHTS[weights][0], **({"bias": BIAS} if bias else {})}


def _of(numbers: dict, i: int) -> dict:
    return {place: numbers[f"{place}{i}"] for place in NUMBERS}


def _adapters(count: int, transposed: bool = False) -> dict:
    a, b = (DOWN[::-1], UP[::-1]) if transposed else (DOWN, UP)
    return {f"{name}{i}": shape for i in range(count) for name, shape in (("z", X), ("down", a), ("up", b))}


def _reference(fn: Callable, inputs: dict, numbers: tuple, weights: str = "matrix", transposed=False) -> Reference:
    variant = {"transposed": transposed, "by_columns": weights == "columns"}
    return Reference(fn, inputs, numbers, variant, WEIGHTS[weights][1], numbers)


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(f"{place}{i}" for i in range(count) for place in NUMBERS)


def _summed(count: int, bias: bool, weights="matrix", transposed=False, adapters_first=False) -> Reference:
    """The layer's result and those of its adapters, added up one after the other."""

    def adapted(x, *rest, **numbers):
        layer, rest = _layer(x, rest, weights, bias)
        each = zip(*(rest[i::3] for i in range(3)), strict=True)
        terms = [branch(*t, transposed=transposed, **_of(numbers, i)) for i, t in enumerate(each)]
        return layer + sum(terms[1:], terms[0]) if adapters_first else sum(terms, layer)

    inputs = {**_examples(bias, weights), **_adapters(count, transposed)}
    return _reference(adapted, inputs, _numbers(count), weights, transposed)


def _with_factors(bias: bool, names: tuple[str, ...], weights="matrix") -> Reference:
    """The adapter times tensors, or by one: a scale that trains, or one for each feature of either matrix."""

    def adapted(x, *rest, **numbers):
        layer, (z, down, up, *rest) = _layer(x, rest, weights, bias)
        factors, numbers = dict(zip(names, rest, strict=True)), _of(numbers, 0)
        u = F.linear(z * numbers["before"], down) * numbers["between"]
        y = F.linear(u * factors["middle"] if "middle" in factors else u, up) * numbers["after"]
        y = y / factors["divisor"] if "divisor" in factors else y
        return layer + (y * factors["gain"] if "gain" in factors else y)

    shapes = {"middle": UP[1:], "gain": BIAS, "divisor": BIAS}
    inputs = {**_examples(bias, weights), **_adapters(1), **{name: shapes[name] for name in names}}
    return _reference(adapted, inputs, _numbers(1), weights)


def _with_own_bias(bias: bool) -> Reference:
    def adapted(x, *rest, after0):
        layer, (z, down, up, up_bias) = _layer(x, rest, "matrix", bias)
        return layer + branch(z, down, up, up_bias, after=after0)

    return _reference(adapted, {**_examples(bias), **_adapters(1), "up_bias": BIAS}, ("after0",))


def _in_the_weight(bias: bool) -> Reference:
    """The product of both matrices is added to the weight."""

    def adapted(x, weight, *rest, before0, after0):
        own, (down, up) = (rest[:1], rest[1:]) if bias else ((), rest)
        return F.linear(x, weight + torch.matmul(up * before0, down) * after0, *own)

    return _reference(adapted, {**_examples(bias), "down0": DOWN, "up0": UP}, ("before0", "after0"))


def _multiplied_out(bias: bool, transposed: bool) -> Reference:
    """Both matrices are multiplied before anything else is."""

    def adapted(x, *rest, between0, after0):
        layer, (z, down, up) = _layer(x, rest, "matrix", bias)
        if transposed:
            return layer + torch.matmul(z, torch.matmul(down, up) * between0) * after0
        return layer + F.linear(z, torch.matmul(up, down) * between0) * after0

    inputs = {**_examples(bias), **_adapters(1, transposed)}
    return _reference(adapted, inputs, ("between0", "after0"), transposed=transposed)


BOTH = (False, True)
FACTORS = (("gain",), ("middle",), ("gain", "middle"), ("divisor",))
FORMS = (
    *(_summed(*form) for form in itertools.product((1, 2), BOTH, WEIGHTS, BOTH)),
    *(_summed(count, bias) for count in range(3, MOST_ADAPTERS + 1) for bias in BOTH),
    *(_summed(count, bias, adapters_first=True) for count in (2, 3) for bias in BOTH),
    *(_with_factors(bias, names) for bias in BOTH for names in FACTORS),
    *(_with_factors(bias, ("gain",), weights) for bias in BOTH for weights in ("4 bits", "4 bits, nested")),
    *(_with_own_bias(bias) for bias in BOTH),
    *(_in_the_weight(bias) for bias in BOTH),
    *(_multiplied_out(*form) for form in itertools.product(BOTH, BOTH)),
)
