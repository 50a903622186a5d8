"""Rotary position embedding of queries and keys, both in one launch.

    out = x * cos + rotate(x) * sin

    half layout:        rotate(x) = [-x2, x1]             for x = [x1, x2], two halves of the last dimension
    interleaved layout: rotate(x) = [-x1, x0, -x3, x2, ...]

With (a, b) a rotated pair and (ca, cb), (sa, sb) its entries of cos and sin, which need not be equal:

    forward:   a' = a*ca - b*sa    b' = b*cb + a*sb
    backward: da = a'*ca + b'*sb   db = b'*cb - a'*sa     the transposed rotation: the same kernel with signs changed
"""

import torch
from torch.autograd.function import once_differentiable

from .common import (
    Output,
    ceil_div,
    collapse,
    compute_dtype,
    jit,
    memory_order,
    next_power_of_2,
    no_autocast,
    on_device,
    register,
    tl,
    traceable,
    triton_dtype,
    use_triton,
)


@traceable
def rotary(q, k, cos, sin, *, interleaved=False):
    """Rotate q and k, computed in float32 (float64 for float64 inputs) with one rounding at the end.

    q, k: [..., D] with D even, any strides, usually [B, H, T, D]; k may have another number of heads, or be None.
    cos, sin: broadcastable to q and to k, last dimension D.
    Returns (q_out, k_out), k_out None without k, with the dtype and the (dense) layout that `q * cos` has.
    Saves cos and sin, and q and k only where cos or sin needs a gradient.
    """
    if q.shape[-1] % 2 or cos.shape[-1] != q.shape[-1] or sin.shape[-1] != q.shape[-1]:
        raise ValueError(f"last dimensions must be equal and even: {q.shape[-1]}, {cos.shape[-1]}, {sin.shape[-1]}")
    out = _Rotary.apply(q, k, cos, sin, interleaved)
    return (out, None) if k is None else out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved):
        inputs = [q] if k is None else [q, k]
        dtypes = [torch.promote_types(x.dtype, cos.dtype) for x in inputs]
        outputs = _rotate(inputs, cos, sin, interleaved, False, dtypes, [None, None])
        tables_need_grad = any(ctx.needs_input_grad[2:4])
        ctx.save_for_backward(cos, sin, *(inputs if tables_need_grad else ()))
        ctx.interleaved, ctx.dtypes = interleaved, [x.dtype for x in inputs]
        ctx.strides = [out.stride() for out in outputs]
        return outputs[0] if k is None else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        cos, sin, *inputs = ctx.saved_tensors
        dq = dk = dcos = dsin = None
        if any(ctx.needs_input_grad[:2]):
            dq, *rest = _rotate(list(grads), cos, sin, ctx.interleaved, True, ctx.dtypes, ctx.strides)
            dk = rest[0] if rest else None
        if ctx.needs_input_grad[2]:
            dcos = _table_grad(grads, inputs, cos)
        if ctx.needs_input_grad[3]:
            dsin = _table_grad(grads, [rotate(x.to(compute_dtype(x)), ctx.interleaved) for x in inputs], sin)
        return dq, dk, dcos, dsin, None


def rotate(x, interleaved):
    """[-x2, x1] of the halves of the last dimension, or of each neighbouring pair if interleaved."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _table_grad(grads, factors, table):
    """Gradient of cos or sin: sum of grad * factor over the dimensions that the table was broadcast along."""
    compute = compute_dtype(*grads, table)
    terms = [(g.to(compute) * f.to(compute)).sum_to_size(table.shape) for g, f in zip(grads, factors, strict=True)]
    return sum(terms[1:], terms[0]).to(table.dtype)


def _rotate(inputs, cos, sin, interleaved, transpose, dtypes, strides):
    """Call the operator for one tensor or two."""
    if len(inputs) == 1:
        arguments = (inputs[0], None, cos, sin, interleaved, transpose, dtypes[0], dtypes[0], strides[0], None)
        return _rotary_op(*arguments)[:1]
    return _rotary_op(*inputs, cos, sin, interleaved, transpose, *dtypes, *strides)


def _fake(q, k, cos, sin, interleaved, transpose, q_dtype, k_dtype, q_strides, k_strides):
    def empty(x, dtype, strides):
        if strides is None:
            return torch.empty_like(x, dtype=dtype)
        return torch.empty_strided(x.shape, strides, dtype=dtype, device=x.device)

    return empty(q, q_dtype, q_strides), q.new_empty(0) if k is None else empty(k, k_dtype, k_strides)


def _implementation(q, k, cos, sin, interleaved, transpose, q_dtype, k_dtype, q_strides, k_strides):
    outputs = _fake(q, k, cos, sin, interleaved, transpose, q_dtype, k_dtype, q_strides, k_strides)
    work = [(x, out) for x, out in zip((q, k), outputs, strict=True) if x is not None]
    if use_triton(q):
        _launch(work, cos, sin, interleaved, transpose)
        return outputs
    with no_autocast(q):
        compute = compute_dtype(q, k, cos, sin)
        cos, sin = cos.to(compute), sin.to(compute)
        for x, out in work:
            x = x.to(compute)
            # rotate is antisymmetric: its transpose is its negative
            out.copy_(x * cos - rotate(x * sin, interleaved) if transpose else x * cos + rotate(x, interleaved) * sin)
    return outputs


@jit
def _rotate_rows(
    first, X, OUT, COS, SIN, count, size_1, size_2, x_0, x_1, x_2, t_0, t_1, t_2, half,
    INTERLEAVED: tl.constexpr, TRANSPOSE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Rotate ROWS rows from `first`: row = (i0 * size_1 + i1) * size_2 + i2; x_i, t_i: strides of X and tables."""
    row = first + tl.arange(0, ROWS)
    i_2 = (row % size_2).to(tl.int64)
    outer = row // size_2
    i_1 = (outer % size_1).to(tl.int64)
    i_0 = (outer // size_1).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    mask = (row < count)[:, None] & (pair < half)[None, :]
    if INTERLEAVED:
        a_at = (2 * pair)[None, :]
        b_at = (2 * pair + 1)[None, :]
    else:
        a_at = pair[None, :]
        b_at = (pair + half)[None, :]
    x = X + (i_0 * x_0 + i_1 * x_1 + i_2 * x_2)[:, None]
    table = (i_0 * t_0 + i_1 * t_1 + i_2 * t_2)[:, None]
    a = tl.load(x + a_at, mask=mask, other=0.0).to(ACC)
    b = tl.load(x + b_at, mask=mask, other=0.0).to(ACC)
    cos_a = tl.load(COS + table + a_at, mask=mask, other=0.0).to(ACC)
    cos_b = tl.load(COS + table + b_at, mask=mask, other=0.0).to(ACC)
    sin_a = tl.load(SIN + table + a_at, mask=mask, other=0.0).to(ACC)
    sin_b = tl.load(SIN + table + b_at, mask=mask, other=0.0).to(ACC)
    if TRANSPOSE:
        new_a = a * cos_a + b * sin_b
        new_b = b * cos_b - a * sin_a
    else:
        new_a = a * cos_a - b * sin_a
        new_b = b * cos_b + a * sin_b
    out = OUT + (row.to(tl.int64) * (2 * half))[:, None]
    tl.store(out + a_at, new_a, mask=mask)
    tl.store(out + b_at, new_b, mask=mask)


@jit
def _rotary_kernel(
    Q, Q_OUT, Q_COS, Q_SIN, q_count, q_size_1, q_size_2, q_0, q_1, q_2, qt_0, qt_1, qt_2,
    K, K_OUT, K_COS, K_SIN, k_count, k_size_1, k_size_2, k_0, k_1, k_2, kt_0, kt_1, kt_2,
    half, q_programs, PAIR: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSE: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The first q_programs programs rotate Q, the rest K (PAIR: there is a K)."""
    program = tl.program_id(0)
    if program < q_programs:
        _rotate_rows(
            program * ROWS, Q, Q_OUT, Q_COS, Q_SIN, q_count, q_size_1, q_size_2, q_0, q_1, q_2, qt_0, qt_1, qt_2, half,
            INTERLEAVED, TRANSPOSE, ACC, ROWS, PAIRS,
        )  # fmt: skip
    elif PAIR:
        _rotate_rows(
            (program - q_programs) * ROWS, K, K_OUT, K_COS, K_SIN, k_count, k_size_1, k_size_2, k_0, k_1, k_2,
            kt_0, kt_1, kt_2, half, INTERLEAVED, TRANSPOSE, ACC, ROWS, PAIRS,
        )  # fmt: skip


def _arguments(x, out, cos, sin, order):
    """Kernel arguments of one tensor: pointers, rows, two inner sizes, three strides of x and three of the tables."""
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    x, cos, sin = (t.expand(x.shape).permute(order) for t in (x, cos, sin))
    if x.stride(-1) != 1:
        x = x.contiguous()
    levels = collapse(x.shape[:-1], x.stride()[:-1], cos.stride()[:-1])
    if cos.stride() != sin.stride() or len(levels) > 3:
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        levels = collapse(x.shape[:-1], x.stride()[:-1], cos.stride()[:-1])
    sizes, x_strides, table_strides = zip(*[[1, 0, 0]] * (3 - len(levels)), *levels, strict=True)
    return x, out, cos, sin, x.numel() // x.shape[-1], *sizes[1:], *x_strides, *table_strides


def _launch(work, cos, sin, interleaved, transpose):
    half = cos.shape[-1] // 2
    if half == 0:
        return
    PAIRS = next_power_of_2(half)
    ROWS = max(1, 1024 // PAIRS)
    orders = [memory_order(out) for _, out in work]
    outputs = [Output(out, order) for (_, out), order in zip(work, orders, strict=True)]
    arguments = [
        _arguments(x, out.rows, cos, sin, order) for (x, _), out, order in zip(work, outputs, orders, strict=True)
    ]
    programs = [ceil_div(a[4], ROWS) for a in arguments]
    if sum(programs) == 0:
        return
    with on_device(cos):
        _rotary_kernel[(sum(programs),)](
            *arguments[0], *arguments[-1], half, programs[0], PAIR=len(work) == 2, INTERLEAVED=interleaved,
            TRANSPOSE=transpose, ACC=triton_dtype(compute_dtype(*(x for x, _ in work), cos, sin)),
            ROWS=ROWS, PAIRS=PAIRS, num_warps=min(max(ROWS * PAIRS // 256, 4), 16),
        )  # fmt: skip
    for out in outputs:
        out.finish()


_rotary_op = register(
    "rotary(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved, bool transpose, ScalarType q_dtype, "
    "ScalarType k_dtype, SymInt[]? q_strides, SymInt[]? k_strides) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)
