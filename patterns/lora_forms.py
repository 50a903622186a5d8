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

X, WEIGHT, BIAS, DOWN, UP = (3, 8), (12, 8), (12,), (2, 8), (12, 2)
MOST_ADAPTERS = 4  # of one layer
NUMBERS = ("before", "between", "after")


def base(x, weight, *bias, by_columns=False):
    """The layer's own product."""
    if not by_columns:
        return F.linear(x, weight, *bias)
    return torch.matmul(x, weight) + bias[0] if bias else torch.matmul(x, weight)


def branch(z, down, up, *up_bias, transposed=False, before=1.0, between=1.0, after=1.0):
    if transposed:
        return torch.matmul(torch.matmul(z * before, down) * between, up) * after
    return F.linear(F.linear(z * before, down) * between, up, *up_bias) * after


def _examples(bias: bool, by_columns: bool) -> dict:
    return {"weight": WEIGHT[::-1] if by_columns else WEIGHT, **({"bias": BIAS} if bias else {})}


def _of(numbers: dict, i: int) -> dict:
    return {place: numbers[f"{place}{i}"] for place in NUMBERS}


def _adapters(count: int, transposed: bool = False) -> dict:
    a, b = (DOWN[::-1], UP[::-1]) if transposed else (DOWN, UP)
    return {f"{name}{i}": shape for i in range(count) for name, shape in (("z", X), ("down", a), ("up", b))}


def _reference(fn: Callable, inputs: dict, count: int = 1, extends: Reference | None = None, **variant) -> Reference:
    numbers = tuple(f"{place}{i}" for i in range(count) for place in NUMBERS)
    variant = {"transposed": False, "by_columns": False, **variant}
    return Reference(fn, inputs, numbers, variant, extends, numbers)


def _summed(count: int, bias: bool, by_columns: bool, transposed: bool, adapters_first: bool = False) -> Reference:
    """The layer's result and those of its adapters, added up one after the other."""

    def adapted(x, weight, *rest, **numbers):
        own, rest = (rest[:1], rest[1:]) if bias else ((), rest)
        each = zip(*(rest[i::3] for i in range(3)), strict=True)
        terms = [branch(*t, transposed=transposed, **_of(numbers, i)) for i, t in enumerate(each)]
        layer = base(x, weight, *own, by_columns=by_columns)
        return layer + sum(terms[1:], terms[0]) if adapters_first else sum(terms, layer)

    inputs = {"x": X, **_examples(bias, by_columns), **_adapters(count, transposed)}
    return _reference(adapted, inputs, count, transposed=transposed, by_columns=by_columns)


def _with_factors(bias: bool, names: tuple[str, ...]) -> Reference:
    """The adapter times tensors, or by one: a scale that trains, or one for each feature of either matrix."""

    def adapted(x, weight, *rest, **numbers):
        own, (z, down, up, *rest) = (rest[:1], rest[1:]) if bias else ((), rest)
        factors, numbers = dict(zip(names, rest, strict=True)), _of(numbers, 0)
        u = F.linear(z * numbers["before"], down) * numbers["between"]
        y = F.linear(u * factors["middle"] if "middle" in factors else u, up) * numbers["after"]
        y = y / factors["divisor"] if "divisor" in factors else y
        return base(x, weight, *own) + (y * factors["gain"] if "gain" in factors else y)

    shapes = {"middle": UP[1:], "gain": BIAS, "divisor": BIAS}
    inputs = {"x": X, **_examples(bias, False), **_adapters(1), **{name: shapes[name] for name in names}}
    return _reference(adapted, inputs)


def _with_own_bias(bias: bool) -> Reference:
    def adapted(x, weight, *rest, after0):
        own, (z, down, up, up_bias) = (rest[:1], rest[1:]) if bias else ((), rest)
        return base(x, weight, *own) + branch(z, down, up, up_bias, after=after0)

    inputs = {"x": X, **_examples(bias, False), **_adapters(1), "up_bias": BIAS}
    return Reference(adapted, inputs, ("after0",), {"transposed": False, "by_columns": False}, None, ("after0",))


def _in_the_weight(bias: bool) -> Reference:
    """The product of both matrices is added to the weight."""

    def adapted(x, weight, *rest, before0, after0):
        own, (down, up) = (rest[:1], rest[1:]) if bias else ((), rest)
        return F.linear(x, weight + torch.matmul(up * before0, down) * after0, *own)

    inputs = {"x": X, **_examples(bias, False), "down0": DOWN, "up0": UP}
    numbers = ("before0", "after0")
    return Reference(adapted, inputs, numbers, {"transposed": False, "by_columns": False}, None, numbers)


def _multiplied_out(bias: bool, transposed: bool) -> Reference:
    """Both matrices are multiplied before anything else is."""

    def adapted(x, weight, *rest, between0, after0):
        own, (z, down, up) = (rest[:1], rest[1:]) if bias else ((), rest)
        if transposed:
            return base(x, weight, *own) + torch.matmul(z, torch.matmul(down, up) * between0) * after0
        return base(x, weight, *own) + F.linear(z, torch.matmul(up, down) * between0) * after0

    inputs = {"x": X, **_examples(bias, False), **_adapters(1, transposed)}
    numbers = ("between0", "after0")
    return Reference(adapted, inputs, numbers, {"transposed": transposed, "by_columns": False}, None, numbers)


BOTH = (False, True)
FACTORS = (("gain",), ("middle",), ("gain", "middle"), ("divisor",))
FORMS = (
    *(_summed(*form) for form in itertools.product((1, 2), BOTH, BOTH, BOTH)),
    *(_summed(count, bias, False, False) for count in range(3, MOST_ADAPTERS + 1) for bias in BOTH),
    *(_summed(count, bias, False, False, True) for count in (2, 3) for bias in BOTH),
    *(_with_factors(bias, names) for bias in BOTH for names in FACTORS),
    *(_with_own_bias(bias) for bias in BOTH),
    *(_in_the_weight(bias) for bias in BOTH),
    *(_multiplied_out(*form) for form in itertools.product(BOTH, BOTH)),
)
