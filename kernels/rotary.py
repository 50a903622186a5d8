"""Rotary position embedding of queries and keys, both in one launch.

    out = x * cos + rotate(x) * sin

    half layout:        rotate(x) = [-x2, x1]             for x = [x1, x2], two halves of the last dimension
    interleaved layout: rotate(x) = [-x1, x0, -x3, x2, ...]

The result may have its pairs in the other layout than x.

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
    launch,
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
def rotary(q, k, cos, sin, *, interleaved=False, out_interleaved=None, out_dtype=None, contiguous=False):
    """Rotate q and k, computed in float32 (float64 for float64 inputs) with one rounding at the end.

    q, k: [..., D] with D even, any strides, usually [B, H, T, D]; k may have another number of heads, or be None.
    cos, sin: broadcastable to q and to k, last dimension D.
    interleaved: the layout of the pairs in q, k, cos and sin; out_interleaved: that of the result, by default the same.
    Returns (q_out, k_out), k_out None without k, contiguous or with the (dense) layout that `q * cos` has, and with
    dtype out_dtype, by default that of `q * cos` too.
    Saves cos and sin, and q and k only where cos or sin needs a gradient.
    """
    if q.shape[-1] % 2 or cos.shape[-1] != q.shape[-1] or sin.shape[-1] != q.shape[-1]:
        raise ValueError(f"last dimensions must be equal and even: {q.shape[-1]}, {cos.shape[-1]}, {sin.shape[-1]}")
    layouts = (interleaved, interleaved if out_interleaved is None else out_interleaved)
    out = _Rotary.apply(q, k, cos, sin, layouts, out_dtype, contiguous)
    return (out, None) if k is None else out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, layouts, out_dtype, contiguous):
        inputs = [q] if k is None else [q, k]
        dtypes = [out_dtype or torch.promote_types(x.dtype, cos.dtype) for x in inputs]
        strides = [_contiguous_strides(x.shape) if contiguous else None for x in inputs]
        outputs = _rotate(inputs, cos, sin, layouts, False, dtypes, strides)
        tables_need_grad = any(ctx.needs_input_grad[2:4])
        ctx.save_for_backward(cos, sin, *(inputs if tables_need_grad else ()))
        ctx.layouts, ctx.dtypes = layouts, [x.dtype for x in inputs]
        ctx.strides = [out.stride() for out in outputs]
        return outputs[0] if k is None else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        cos, sin, *inputs = ctx.saved_tensors
        dq = dk = dcos = dsin = None
        if any(ctx.needs_input_grad[:2]):
            dq, *rest = _rotate(list(grads), cos, sin, ctx.layouts, True, ctx.dtypes, ctx.strides)
            dk = rest[0] if rest else None
        layout, out_layout = ctx.layouts
        if any(ctx.needs_input_grad[2:4]) and layout != out_layout:
            grads = [join(*split(g, out_layout), layout) for g in grads]
        if ctx.needs_input_grad[2]:
            dcos = _table_grad(grads, inputs, cos)
        if ctx.needs_input_grad[3]:
            dsin = _table_grad(grads, [rotate(x.to(compute_dtype(x)), layout) for x in inputs], sin)
        return dq, dk, dcos, dsin, None, None, None


def _contiguous_strides(shape):
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def split(x, interleaved):
    """The first and the second features of all pairs."""
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)


def join(first, second, interleaved):
    """The inverse of `split`."""
    return torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)


def rotate(x, interleaved):
    """[-x2, x1] of the halves of the last dimension, or of each neighbouring pair if interleaved."""
    first, second = split(x, interleaved)
    return join(-second, first, interleaved)


def _table_grad(grads, factors, table):
    """Gradient of cos or sin: sum of grad * factor over the dimensions that the table was broadcast along."""
    compute = compute_dtype(*grads, table)
    terms = [(g.to(compute) * f.to(compute)).sum_to_size(table.shape) for g, f in zip(grads, factors, strict=True)]
    return sum(terms[1:], terms[0]).to(table.dtype)


def _rotate(inputs, cos, sin, layouts, transpose, dtypes, strides):
    """Call the operator for one tensor or two."""
    if len(inputs) == 1:
        arguments = (inputs[0], None, cos, sin, *layouts, transpose, dtypes[0], dtypes[0], strides[0], None)
        return _rotary_op(*arguments)[:1]
    return _rotary_op(*inputs, cos, sin, *layouts, transpose, *dtypes, *strides)


def _fake(q, k, cos, sin, interleaved, out_interleaved, transpose, q_dtype, k_dtype, q_strides, k_strides):
    def empty(x, dtype, strides):
        if strides is None:
            return torch.empty_like(x, dtype=dtype)
        return torch.empty_strided(x.shape, strides, dtype=dtype, device=x.device)

    return empty(q, q_dtype, q_strides), q.new_empty(0) if k is None else empty(k, k_dtype, k_strides)


def _implementation(q, k, cos, sin, interleaved, out_interleaved, transpose, q_dtype, k_dtype, q_strides, k_strides):
    outputs = _fake(q, k, cos, sin, interleaved, out_interleaved, transpose, q_dtype, k_dtype, q_strides, k_strides)
    work = [(x, out) for x, out in zip((q, k), outputs, strict=True) if x is not None]
    if use_triton(q):
        _launch(work, cos, sin, interleaved, out_interleaved, transpose)
        return outputs
    layout, out_layout = (out_interleaved, interleaved) if transpose else (interleaved, out_interleaved)
    with no_autocast(q):
        compute = compute_dtype(q, k, cos, sin)
        (cos_a, cos_b), (sin_a, sin_b) = (split(t.to(compute), interleaved) for t in (cos, sin))
        for x, out in work:
            a, b = split(x.to(compute), layout)
            if transpose:
                pair = a * cos_a + b * sin_b, b * cos_b - a * sin_a
            else:
                pair = a * cos_a - b * sin_a, b * cos_b + a * sin_b
            out.copy_(join(*pair, out_layout))
    return outputs


@jit
def _load_pairs(
    X, live, HALF: tl.constexpr, NEIGHBOURS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """The first and second features of the pairs, [ROWS, PAIRS] each; X: [ROWS, 1] pointers to where rows begin."""
    pair = tl.arange(0, PAIRS)[None, :]
    if NEIGHBOURS:  # one contiguous load
        feature = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.load(X + feature, mask=live & (feature < 2 * HALF), other=0.0).to(ACC)
        return tl.split(tl.reshape(x, [ROWS, PAIRS, 2]))
    else:
        a = tl.load(X + pair, mask=live & (pair < HALF), other=0.0).to(ACC)
        return a, tl.load(X + (pair + HALF), mask=live & (pair < HALF), other=0.0).to(ACC)


@jit
def _store_pairs(OUT, a, b, live, HALF: tl.constexpr, NEIGHBOURS: tl.constexpr, PAIRS: tl.constexpr):
    """The inverse of `_load_pairs`."""
    if NEIGHBOURS:
        feature = tl.arange(0, 2 * PAIRS)[None, :]
        tl.store(OUT + feature, tl.interleave(a, b), mask=live & (feature < 2 * HALF))
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        tl.store(OUT + pair, a, mask=live & (pair < HALF))
        tl.store(OUT + (pair + HALF), b, mask=live & (pair < HALF))


@jit
def _rotate_rows(
    first, X, OUT, COS, SIN, count, size_1, size_2, x_0, x_1, x_2, t_0, t_1, t_2, HALF: tl.constexpr,
    X_PAIRS: tl.constexpr, OUT_PAIRS: tl.constexpr, T_PAIRS: tl.constexpr, TRANSPOSE: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Rotate ROWS rows from `first`: row = (i0 * size_1 + i1) * size_2 + i2; x_i, t_i: strides of X and tables.

    _PAIRS: whether the pairs of X, OUT and the tables are neighbours.
    """
    row = first + tl.arange(0, ROWS)
    i_2 = (row % size_2).to(tl.int64)
    outer = row // size_2
    i_1 = (outer % size_1).to(tl.int64)
    i_0 = (outer // size_1).to(tl.int64)
    live = (row < count)[:, None]
    table = (i_0 * t_0 + i_1 * t_1 + i_2 * t_2)[:, None]
    a, b = _load_pairs(X + (i_0 * x_0 + i_1 * x_1 + i_2 * x_2)[:, None], live, HALF, X_PAIRS, ACC, ROWS, PAIRS)
    cos_a, cos_b = _load_pairs(COS + table, live, HALF, T_PAIRS, ACC, ROWS, PAIRS)
    sin_a, sin_b = _load_pairs(SIN + table, live, HALF, T_PAIRS, ACC, ROWS, PAIRS)
    if TRANSPOSE:
        new_a = a * cos_a + b * sin_b
        new_b = b * cos_b - a * sin_a
    else:
        new_a = a * cos_a - b * sin_a
        new_b = b * cos_b + a * sin_b
    _store_pairs(OUT + (row.to(tl.int64) * (2 * HALF))[:, None], new_a, new_b, live, HALF, OUT_PAIRS, PAIRS)


@jit
def _rotary_kernel(
    Q, Q_OUT, Q_COS, Q_SIN, q_count, q_size_1, q_size_2, q_0, q_1, q_2, qt_0, qt_1, qt_2,
    K, K_OUT, K_COS, K_SIN, k_count, k_size_1, k_size_2, k_0, k_1, k_2, kt_0, kt_1, kt_2,
    q_programs, PAIR: tl.constexpr, HALF: tl.constexpr, X_PAIRS: tl.constexpr, OUT_PAIRS: tl.constexpr,
    T_PAIRS: tl.constexpr, TRANSPOSE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The first q_programs programs rotate Q, the rest K (PAIR: there is a K)."""
    program = tl.program_id(0)
    if program < q_programs:
        _rotate_rows(
            program * ROWS, Q, Q_OUT, Q_COS, Q_SIN, q_count, q_size_1, q_size_2, q_0, q_1, q_2, qt_0, qt_1, qt_2, HALF,
            X_PAIRS, OUT_PAIRS, T_PAIRS, TRANSPOSE, ACC, ROWS, PAIRS,
        )  # fmt: skip
    elif PAIR:
        _rotate_rows(
            (program - q_programs) * ROWS, K, K_OUT, K_COS, K_SIN, k_count, k_size_1, k_size_2, k_0, k_1, k_2,
            kt_0, kt_1, kt_2, HALF, X_PAIRS, OUT_PAIRS, T_PAIRS, TRANSPOSE, ACC, ROWS, PAIRS,
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


def _launch(work, cos, sin, interleaved, out_interleaved, transpose):
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
        launch(_rotary_kernel, sum(programs))(
            *arguments[0], *arguments[-1], programs[0], PAIR=len(work) == 2, HALF=half, TRANSPOSE=transpose,
            X_PAIRS=out_interleaved if transpose else interleaved,
            OUT_PAIRS=interleaved if transpose else out_interleaved, T_PAIRS=interleaved,
            ACC=triton_dtype(compute_dtype(*(x for x, _ in work), cos, sin)),
            ROWS=ROWS, PAIRS=PAIRS, num_warps=min(max(ROWS * PAIRS // 256, 4), 16),
        )  # fmt: skip
    for out in outputs:
        out.finish()


_rotary_op = register(
    "rotary(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved, bool out_interleaved, bool transpose, "
    "ScalarType q_dtype, ScalarType k_dtype, SymInt[]? q_strides, SymInt[]? k_strides) -> (Tensor, Tensor)",
    _implementation,
    _fake,
    traced=True,
)
