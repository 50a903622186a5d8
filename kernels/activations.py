"""Activation functions and their derivatives, once in PyTorch and once in Triton."""

import math

import torch

from .common import jit, tanh, tl

_SQRT_HALF = math.sqrt(0.5)
_NORMAL = 1 / math.sqrt(2 * math.pi)
_GELU = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def _silu(x):
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def _gelu(x):
    phi = 0.5 * (1 + torch.erf(x * _SQRT_HALF))
    return x * phi, phi + x * _NORMAL * torch.exp(-0.5 * x * x)


def _gelu_tanh(x):
    t = torch.tanh(_GELU * (x + _CUBIC * x * x * x))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _GELU * (1 + 3 * _CUBIC * x * x)


def _relu(x):
    return torch.relu(x), (x > 0).to(x.dtype)


def _relu2(x):
    r = torch.relu(x)
    return r * r, 2 * r


def _sigmoid(x):
    s = torch.sigmoid(x)
    return s, s * (1 - s)


def _tanh(x):
    t = torch.tanh(x)
    return t, 1 - t * t


# name -> function x -> (value, derivative); `value` and `derivative` below say the same in Triton
ACTIVATIONS = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
}


@jit
def value(x, ACTIVATION: tl.constexpr):
    """act(x), for a name in ACTIVATIONS."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu2":
        return tl.where(x < 0, 0.0, x * x)
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "tanh")
        return tanh(x)


@jit
def derivative(x, ACTIVATION: tl.constexpr):
    """act'(x), for a name in ACTIVATIONS."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1 + x * (1 - s))
    elif ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * x * x)
    elif ACTIVATION == "relu":
        return tl.where(x > 0, 1.0, tl.where(x == x, 0.0, x))
    elif ACTIVATION == "relu2":
        return tl.where(x < 0, 0.0, 2 * x)
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(x)
        return s * (1 - s)
    else:
        tl.static_assert(ACTIVATION == "tanh")
        t = tanh(x)
        return 1 - t * t
