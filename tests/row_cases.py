"""The memory-bound kernels' cases: eager formulas, and what must hold for each of them whatever runs, on any device.

A case makes its inputs through `rows`, a function of (shape, seed) that chooses memory layout and magnitude, so that
every kernel meets every layout, gradient, magnitude and dtype; numerics.py has the rule and the table of tolerances.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from numerics import (
    assert_equal,
    compare,
    eager_cross_entropy,
    eager_glu,
    eager_glu_packed,
    eager_rms_norm,
    eager_rotary,
    strided,
    upstream_like,
    wide,
)

from rewriter.kernels.cross_entropy import cross_entropy
from rewriter.kernels.glu import glu, glu_packed
from rewriter.kernels.layer_norm import add_layer_norm, layer_norm
from rewriter.kernels.rms_norm import add_rms_norm, rms_norm
from rewriter.kernels.rotary import rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH, EVEN = 33, 34
GRADIENTS = ["dense", "expanded", "strided", "transposed"]


class Case(NamedTuple):
    new: Callable
    old: Callable
    build: Callable  # (rows, vector) -> inputs


def eager_layer_norm(x, w, b):
    h = wide(x)
    d = h - h.mean(-1, keepdim=True)
    n = d * torch.rsqrt(d.square().mean(-1, keepdim=True) + 1e-6)
    n = n if w is None else n * wide(w)
    return (n if b is None else n + wide(b)).to(x.dtype)


def _tables(rows, width):
    """Angles that differ between the halves, so that no entry may stand for another; cos and sin have no gradient."""
    angle = torch.linspace(0, 6, 5 * width).view(1, 1, 5, width)
    like = rows((1, 1, 1, width), 9)
    return [t.to(like) for t in (angle.cos(), angle.sin())]


def _targets(rows):
    """One label a row, the second one ignored; the logits' device."""
    target = torch.arange(10).view(2, 5) * 3 % WIDTH
    target[0, 1] = -100
    return target.to(rows((1, 1), 0).device)


def _cross_entropy(rows, vector):
    return [rows((2, 5, WIDTH), 1), _targets(rows)]


CASES = {
    "rms_norm": Case(
        lambda x, w: rms_norm(x, w, 1e-6, offset=1.0),
        lambda x, w: eager_rms_norm(x, w, 1e-6, offset=1.0),
        lambda rows, vector: [rows((2, 5, WIDTH), 1), vector(WIDTH, 2)],
    ),
    "rms_norm, no weight": Case(
        lambda x: rms_norm(x, None, 1e-6),
        lambda x: eager_rms_norm(x, None, 1e-6),
        lambda rows, vector: [rows((2, 5, WIDTH), 1)],
    ),
    "rms_norm of heads": Case(
        lambda x, w: rms_norm(x, w, 1e-6, round_before_weight=True),
        lambda x, w: eager_rms_norm(x, w, 1e-6, round_before_weight=True),
        lambda rows, vector: [rows((2, 3, 5, 7), 1), vector(7, 2)],
    ),
    "add_rms_norm": Case(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-6),
        lambda x, r, w: (eager_rms_norm(x + r, w, 1e-6), x + r),
        lambda rows, vector: [rows((2, 5, WIDTH), 1), rows((2, 5, WIDTH), 2), vector(WIDTH, 3)],
    ),
    "layer_norm": Case(
        lambda x, w, b: layer_norm(x, w, b, 1e-6),
        eager_layer_norm,
        lambda rows, vector: [rows((2, 5, WIDTH), 1), vector(WIDTH, 2), vector(WIDTH, 3)],
    ),
    "layer_norm, no vectors": Case(
        lambda x: layer_norm(x, None, None, 1e-6),
        lambda x: eager_layer_norm(x, None, None),
        lambda rows, vector: [rows((2, 5, WIDTH), 1)],
    ),
    "add_layer_norm": Case(
        lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-6),
        lambda x, r, w, b: (eager_layer_norm(x + r, w, b), x + r),
        lambda rows, vector: [rows((2, 5, WIDTH), 1), rows((2, 5, WIDTH), 2), vector(WIDTH, 3), vector(WIDTH, 4)],
    ),
    "rotary": Case(
        rotary, eager_rotary, lambda rows, vector: [rows((2, 3, 5, 6), 1), rows((2, 1, 5, 6), 2), *_tables(rows, 6)]
    ),
    "rotary, interleaved": Case(
        lambda *t: rotary(*t, interleaved=True),
        lambda *t: eager_rotary(*t, interleaved=True),
        lambda rows, vector: [rows((2, 3, 5, 10), 1), rows((2, 1, 5, 10), 2), *_tables(rows, 10)],
    ),
    "rotary, partial": Case(
        lambda q, k, *t: rotary(q[..., :6], k[..., 4:], *t),
        lambda q, k, *t: eager_rotary(q[..., :6], k[..., 4:], *t),
        lambda rows, vector: [rows((2, 3, 5, 10), 1), rows((2, 1, 5, 10), 2), *_tables(rows, 6)],
    ),
    "glu": Case(
        lambda g, u: glu(g, u, activation="silu"),
        lambda g, u: eager_glu(g, u, "silu"),
        lambda rows, vector: [rows((2, 5, WIDTH), 1), _tame(rows((2, 5, WIDTH), 2))],
    ),
    "glu, packed": Case(
        lambda x: glu_packed(x, activation="gelu_tanh", gate_first=False),
        lambda x: eager_glu_packed(x, "gelu_tanh", gate_first=False),
        lambda rows, vector: [_tame(rows((2, 5, 2 * EVEN), 1), EVEN)],
    ),
    "glu, interleaved": Case(
        lambda x: glu_packed(x, activation="silu", interleaved=True, alpha=1.702, limit=7.0, shift=1.0),
        lambda x: eager_glu_packed(x, "silu", interleaved=True, alpha=1.702, limit=7.0, shift=1.0),
        lambda rows, vector: [rows((2, 5, 2 * WIDTH), 1)],
    ),
    "cross_entropy": Case(cross_entropy, eager_cross_entropy, _cross_entropy),
    "cross_entropy of rows": Case(
        lambda z, t: cross_entropy(z, t, reduction="none"),
        lambda z, t: eager_cross_entropy(z, t, reduction="none"),
        _cross_entropy,
    ),
    "cross_entropy, all options": Case(
        lambda z, t: cross_entropy(z, t, label_smoothing=0.1, scale=0.5, softcap=30.0, z_loss=1e-3),
        lambda z, t: eager_cross_entropy(z, t, label_smoothing=0.1, scale=0.5, softcap=30.0, z_loss=1e-3),
        _cross_entropy,
    ),
}


def _tame(x, columns=None):
    """x, or its first columns, between -1 and 1: what large numbers are multiplied by, so that eager stays finite."""
    memory = x[:1] if x.stride(0) == 0 else x
    with torch.no_grad():
        memory[..., :columns].clamp_(-1, 1)
    return x


# --- memory layouts: shape, seed -> a tensor with that shape


def _permuted(*shape, **options):
    """The two dimensions before the last in the other order: tokens and heads, or batch and tokens."""
    order = list(range(len(shape)))
    order[-3:-1] = order[-3:-1][::-1]
    return strided(*shape, order=order, **options)


def _columns(*shape, **options):
    """The last dimension is not the innermost one."""
    order = list(range(len(shape)))
    return strided(*shape, order=[*order[:-2], order[-1], order[-2]], **options)


def _slice(*shape, grad=True, **options):
    """Part of a packed projection, beginning at an odd place."""
    return strided(*shape[:-1], 3 * shape[-1] + 5, grad=False, **options)[..., 3 : 3 + shape[-1]].requires_grad_(grad)


def _gaps(*shape, grad=True, **options):
    return strided(*shape[:-1], 2 * shape[-1], grad=False, **options)[..., ::2].requires_grad_(grad)


def _expanded(*shape, grad=True, **options):
    return strided(1, *shape[1:], grad=False, **options).expand(shape).requires_grad_(grad)


LAYOUTS = {
    "dense": strided, "permuted": _permuted, "columns": _columns, "slice": _slice, "gaps": _gaps, "expanded": _expanded,
}  # fmt: skip


def check(case, dtype, device, *, layout="dense", kind="dense", scale=1.0, largest=None):
    """A case by the rule; scale, largest: multiply the rows and cut their numbers off."""

    def rows(shape, seed):
        x = LAYOUTS[layout](*shape, dtype=dtype, device=device, grad=False, seed=seed)
        x = _keep_layout(x, lambda t: (t.float() * scale).clamp(*([-largest, largest] if largest else [None, 3e38])))
        return x.requires_grad_()

    def vector(n, seed):
        return strided(n, dtype=dtype, device=device, seed=seed)

    new, old, build = CASES[case]
    compare(new, old, build(rows, vector), kind=kind, layout=layout not in ("expanded", "gaps", "slice"))


def _keep_layout(x, function):
    """function applied to all of x's memory, so that layout and gaps stay."""
    size = x.untyped_storage().nbytes() // x.element_size()
    memory = x.as_strided((size,), (1,), 0)
    return function(memory).to(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


# --- what must hold, functions of (case, dtype, device)


def every_layout(case, dtype, device):
    for layout in LAYOUTS:
        check(case, dtype, device, layout=layout)


def every_gradient(case, dtype, device):
    for kind in GRADIENTS:
        check(case, dtype, device, kind=kind)


def large_numbers(case, dtype, device):
    check(case, dtype, device, scale=1e4, largest=_limit(case, dtype))


def small_numbers(case, dtype, device):
    check(case, dtype, device, scale=1e-4)


def numbers_near_the_largest(case, dtype, device):
    """Of float16, all of them at once: a square or a sum of two would overflow."""
    check(case, dtype, device, scale=1e6, largest=_limit(case, torch.float16))


def _limit(case, dtype):
    """So that eager's own results are finite in float16: a sum of two, logits' differences, products of three."""
    if dtype is not torch.float16:
        return None
    limits = {"rms_norm": 6e4, "layer_norm": 6e4, "glu": 1e4, "glu, packed": 1e4, "glu, interleaved": 2e3}
    return limits.get(case, 3e4)


PROPERTIES = [every_layout, every_gradient, large_numbers, small_numbers, numbers_near_the_largest]


def offsets_that_pass_32_bits(case, device):
    """Rows and their gradients that lie 2^31 elements apart are read as the same numbers side by side are.

    Of the 4 GiB that they span, a few pages are touched: on a CPU no more than those take memory.
    """
    apart, room = 2**31 + 64, 1024
    memory = torch.empty(apart + 8 * room, dtype=torch.bfloat16, device=device)
    begun = iter(range(8))

    def far(x):
        strides = (apart, *torch.empty(x.shape[1:], device="meta").stride())
        assert x.shape[0] == 2 and x[0].numel() <= room
        return memory.data.as_strided(x.shape, strides, room * next(begun)).copy_(x)  # .data: of a version of its own

    def leaves(place):
        return lambda shape, seed: (
            place(strided(*shape, dtype=torch.bfloat16, device=device, grad=False, seed=seed)).requires_grad_()
            if shape[0] == 2
            else strided(*shape, dtype=torch.bfloat16, device=device)
        )

    def vector(n, seed):
        return strided(n, dtype=torch.bfloat16, device=device, seed=seed)

    new, _, build = CASES[case]
    results = []
    for place in (far, lambda x: x):
        inputs = build(leaves(place), vector)
        outs = new(*inputs)
        outs = [t for t in (outs if isinstance(outs, tuple) else (outs,)) if t is not None]
        upstream = [place(t) if t.dim() > 1 else t for t in map(upstream_like, outs)]
        wanted = [t for t in inputs if t.requires_grad]
        results.append((outs, torch.autograd.grad(outs, wanted, upstream)))
    assert_equal(*results)
