"""Activations written out as products: `0.5 * x * (1 + tanh(...))` and `x * sigmoid(a * x)`, factors in any order."""

from __future__ import annotations

import math

from rewriter.shadow import Value

_CLOSE = 1e-4  # constants are often written with few digits


def activation(product: Value) -> tuple[str, tuple[Value, ...]] | None:
    """(operator, operands) of the activation that a product is; None if it is none."""
    constant, factors = _factors(product)
    if len(factors) != 2:
        return None
    for x, gate in (factors, factors[::-1]):
        if gate.op == "sigmoid":
            scale, inside = _factors(gate.inputs[0])
            if constant == 1.0 and len(inside) == 1 and inside[0].number == x.number:
                return ("silu", (x,)) if scale == 1.0 else ("swish", (x, gate.inputs[0].inputs[_constant_at(gate)]))
        inner = _one_plus(gate)
        if inner is not None and math.isclose(constant, 0.5, rel_tol=_CLOSE):
            if inner.op == "erf" and _is(inner.inputs[0], x, math.sqrt(0.5)):
                return "gelu", (x,)
            if inner.op == "tanh" and _is_cubic(inner.inputs[0], x):
                return "gelu_tanh", (x,)
    return None


def _constant_at(gate: Value) -> int:
    return 0 if gate.inputs[0].inputs[0].op == "const" else 1


def _factors(value: Value) -> tuple[float, list[Value]]:
    """A product as its constant and its other factors."""
    if value.op == "const":
        return float(value.const), []
    if value.op != "mul":
        return 1.0, [value]
    left, right = map(_factors, value.inputs)
    return left[0] * right[0], left[1] + right[1]


def _one_plus(value: Value) -> Value | None:
    if value.op != "add":
        return None
    for a, b in (value.inputs, value.inputs[::-1]):
        if b.op == "const" and b.const == 1.0:
            return a
    return None


def _is(value: Value, x: Value, constant: float) -> bool:
    scale, factors = _factors(value)
    return len(factors) == 1 and factors[0].number == x.number and math.isclose(scale, constant, rel_tol=_CLOSE)


def _is_cubic(value: Value, x: Value) -> bool:
    """sqrt(2 / pi) * (x + 0.044715 x^3), or with x factored out."""
    scale, factors = _factors(value)
    if not math.isclose(scale, math.sqrt(2 / math.pi), rel_tol=_CLOSE):
        return False
    if len(factors) == 1 and factors[0].op == "add":
        for a, b in (factors[0].inputs, factors[0].inputs[::-1]):
            if a.number == x.number and _is_power(b, x, 3.0):
                return True
    if len(factors) == 2:
        for a, b in (factors, factors[::-1]):
            if a.number == x.number and (inner := _one_plus(b)) is not None and _is_power(inner, x, 2.0):
                return True
    return False


def _is_power(value: Value, x: Value, exponent: float) -> bool:
    """0.044715 * x ** exponent, as one power or as a product."""
    scale, factors = _factors(value)
    powers = {"square": 2.0, "pow": 3.0}
    total = 0.0
    for factor in factors:
        base = factor.inputs[0] if factor.op in powers else factor
        if base.number != x.number or (factor.op == "pow" and factor.inputs[1].const != 3.0):
            return False
        total += powers.get(factor.op, 1.0)
    return total == exponent and math.isclose(scale, 0.044715, rel_tol=_CLOSE)
