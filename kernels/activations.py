"""Activation functions and their derivatives, once in PyTorch and once in Triton.

    identity    x                               relu        max(x, 0)
    silu        x sigmoid(alpha x)              relu2       max(x, 0)^2
    gelu        x Phi(x)                        elu         x for x > 0, else exp(x) - 1
    gelu_tanh   x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2
    sigmoid     1 / (1 + exp(-x))               leaky_relu  x for x > 0, else x / 100
    tanh        tanh(x)                         softplus    log(1 + exp(x)), x above 20
    mish        x tanh(log(1 + exp(x)))

At a kink the derivative is PyTorch's.
"""

import math

import torch

from .common import jit, tanh, tl

_SQRT_HALF = math.sqrt(0.5)
_NORMAL = 1 / math.sqrt(2 * math.pi)
_GELU = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def _identity(x):
    return x, torch.ones_like(x)


def _silu(x, alpha=1.0):
    s = torch.sigmoid(alpha * x)
    return x * s, s * (1 + alpha * x * (1 - s))


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


def _softplus(x):
    return torch.nn.functional.softplus(x), torch.where(x > 20, 1.0, torch.sigmoid(x))


def _mish(x):
    t = torch.tanh(torch.nn.functional.softplus(x))
    return x * t, t + x * torch.sigmoid(x) * (1 - t * t)


def _elu(x):
    return torch.where(x > 0, x, torch.expm1(x)), torch.where(x > 0, 1.0, torch.exp(x))


def _leaky_relu(x):
    slope = torch.where(x > 0, 1.0, torch.full_like(x, 0.01))
    return x * slope, slope


# name -> function x -> (value, derivative); `value` and `derivative` below say the same in Triton
ACTIVATIONS = {
    "identity": _identity,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "softplus": _softplus,
    "mish": _mish,
    "elu": _elu,
    "leaky_relu": _leaky_relu,
}

# Where x <= 0, PyTorch's gradient of a relu is 0 whatever comes in: a product with a derivative of 0 would keep NaN.
CUT = ("relu", "relu2")


def reference(x, activation, alpha):
    """(act(x), act'(x)), for a name in ACTIVATIONS; alpha is silu's and 1 elsewhere."""
    return _silu(x, alpha) if activation == "silu" else ACTIVATIONS[activation](x)


@jit
def _mish_tanh(x):
    """(tanh(softplus(x)), 1 - its square) from e = exp(x): n / (n + 2) and 4 (n + 1) / (n + 2)^2, n = e (e + 2)."""
    e = tl.exp(tl.where(x > 20, 20.0, x))
    n = e * (e + 2)
    return tl.where(x > 20, 1.0, n / (n + 2)), tl.where(x > 20, 0.0, 4 * (n + 1) / ((n + 2) * (n + 2)))


@jit
def value(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """act(x), for a name in ACTIVATIONS; ALPHA is silu's and 1 elsewhere."""
    if ACTIVATION == "identity":
        return x
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x if ALPHA == 1.0 else ALPHA * x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(z)) / 2 = sigmoid(2 z)
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu2":
        return tl.where(x < 0, 0.0, x * x)
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(x)
    elif ACTIVATION == "softplus":
        # log(1 + e) with the rounding of u = 1 + e undone: log(u) e / (u - 1)
        e = tl.exp(-tl.abs(x))
        u = 1 + e
        log = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
        return tl.where(x > 20, x, tl.where(x < 0, 0.0, x) + log)
    elif ACTIVATION == "mish":
        t, _ = _mish_tanh(x)
        return x * t
    elif ACTIVATION == "elu":
        t = tanh(0.5 * tl.where(x > 0, 0.0, x))
        return tl.where(x > 0, x, 2 * t / (1 - t))  # exp(x) - 1 without cancellation
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, 0.01 * x)
    else:
        tl.static_assert(ACTIVATION == "tanh")
        return tanh(x)


@jit
def derivative(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """act'(x), for a name in ACTIVATIONS; ALPHA is silu's and 1 elsewhere."""
    if ACTIVATION == "identity":
        return tl.full(x.shape, 1.0, x.dtype)
    elif ACTIVATION == "silu":
        z = x if ALPHA == 1.0 else ALPHA * x
        s = tl.sigmoid(z)
        return s * (1 + z * (1 - s))
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
    elif ACTIVATION == "softplus":
        return tl.where(x > 20, 1.0, tl.sigmoid(x))
    elif ACTIVATION == "mish":
        t, rest = _mish_tanh(x)
        return t + x * tl.sigmoid(x) * rest
    elif ACTIVATION == "elu":
        return tl.where(x > 0, 1.0, tl.exp(x))
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, 1.0, tl.full(x.shape, 0.01, x.dtype))
    else:
        tl.static_assert(ACTIVATION == "tanh")
        t = tanh(x)
        return 1 - t * t
