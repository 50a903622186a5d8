"""The products of low-rank adapters on Hopper, so that what the adapters add costs next to nothing.

    products          y_i = x W_i^T + u_i B_i^T (+ bias_i), rounded once; one launch for all i
    input_gradient    dx = sum_i dY_i W_i + v A, rounded once; one launch
    gradients         v_i = dY_i B_i and dB_i = dY_i^T u_i: each dY_i is read once for both

u = x A^T and dA = v^T x are the library's products: it reads x at the memory's speed, too. A is [branches * each, D],
the adapters below one another, each with `each` rows; u and v are [T, branches * each]. Sums that several programs
share are added up afterwards, in order: no atomics, equal bits on repeat.
"""

import torch

from .common import (
    ceil_div,
    halves,
    has_aligned_rows,
    has_tensor_memory_accelerator,
    jit,
    launch,
    next_power_of_2,
    processors,
    tl,
)

TILE = {"BM": 128, "BN": 256, "BK": 64}
LAUNCH = {"num_warps": 8, "num_stages": 3}
MOST_BRANCHES, MOST_RANK = 3, 64
PASS = {"BM": 64, "BN": 512}
MOST_RANK_OF_PASS = 16  # [512, rank] numbers stay in registers; with a rank of 64 two products are faster (NOTES)


def suits(*matrices, each):
    """Whether this file does it: bfloat16 on Hopper, few branches of a low rank, rows that start at 16 bytes."""
    return (
        has_tensor_memory_accelerator(matrices[0])
        and each <= MOST_RANK
        and all(t.dtype is torch.bfloat16 and has_aligned_rows(t) for t in matrices)
        and all(t.numel() > 0 for t in matrices)
    )


def products(x, weights, biases, u, up, each):
    """The y_i [T, N_i] of x [T, D], weights [N_i, D], u [T, branches * each] and up [N_i, R_i]."""
    (count, width), programs = x.shape, processors(x)
    outputs = [x.new_empty(count, len(w)) for w in weights]
    branches = []
    for w, y, b, bias in zip(weights, outputs, up, biases, strict=True):
        branches += [w, y, b, bias, len(w), w.stride(0), b.shape[1]]
    branches += [None] * (7 * (MOST_BRANCHES - len(weights)))
    launch(_products_kernel, programs, scratch=x)(
        x, u, *branches, count, width, x.stride(0), u.stride(0), each,
        RANK=max(16, next_power_of_2(max(b.shape[1] for b in up))), **TILE, PROGRAMS=programs, **LAUNCH,
    )  # fmt: skip
    return outputs


def input_gradient(grads, weights, v, down):
    """dx [T, D] of grads [T, N_i], weights [N_i, D], v [T, R] and down [R, D], or without them if they are None."""
    width, programs = weights[0].shape[1], processors(grads[0])
    dx = grads[0].new_empty(len(grads[0]), width)
    branches = []
    for g, w in zip(grads, weights, strict=True):
        branches += [g, w, len(w), g.stride(0), w.stride(0)]
    branches += [None] * (5 * (MOST_BRANCHES - len(weights)))
    ranks = 0 if v is None else v.shape[1]
    launch(_input_gradient_kernel, programs, scratch=dx)(
        dx, v, down, *branches, len(dx), width, ranks, 0 if v is None else v.stride(0),
        RK=64 if ranks % 64 == 0 else 32 if ranks % 32 == 0 else 16, **TILE, PROGRAMS=programs, **LAUNCH,
    )  # fmt: skip
    return dx


def gradients(grads, up, u, each):
    """(v [T, branches * each], [dB_i [N_i, R_i]]) of grads [T, N_i], up [N_i, R_i] and u [T, branches * each]."""
    count, outs = len(u), [g.shape[1] for g in grads]
    BM, BN = PASS["BM"], PASS["BN"] if min(outs) >= 2048 else PASS["BN"] // 2
    blocks = [ceil_div(n, BN) for n in outs]
    splits = max(1, processors(u) // sum(blocks))  # parts of the rows: all programs run at once
    v_parts = u.new_empty(sum(blocks), count, each, dtype=torch.float32)
    b_parts = [u.new_empty(splits, n, each, dtype=torch.float32) for n in outs]
    branches = []
    for g, b, part in zip(grads, up, b_parts, strict=True):
        branches += [g, b, part, g.shape[1], g.stride(0), b.shape[1]]
    branches += [None] * (6 * (MOST_BRANCHES - len(grads)))
    launch(_pass_kernel, sum(blocks), splits, scratch=u)(
        u, v_parts, *branches, count, ceil_div(ceil_div(count, BM), splits) * BM, u.stride(0), each,
        RANK=max(16, next_power_of_2(each)), BM=BM, BN=BN, num_warps=8, num_stages=3,
    )  # fmt: skip
    v, start = [], 0
    for number in blocks:
        v.append(v_parts[start : start + number].sum(0).to(u.dtype))
        start += number
    dup = [part.sum(0)[:, : b.shape[1]].to(b.dtype) for part, b in zip(b_parts, up, strict=True)]
    return torch.cat(v, 1) if len(v) > 1 else v[0], dup


@jit
def _matrix(X, row_count, columns, step, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A matrix that is loaded and stored by tiles; 0 is loaded beyond its edges."""
    # `step` is not cast: torch 2.11, in search of what a launch writes, makes it a constant, which has no `to`.
    return tl.make_tensor_descriptor(X, [row_count, columns], [step, 1], [ROWS, COLUMNS])


@jit
def _place(tile, down, across, BM: tl.constexpr, BN: tl.constexpr):
    """First row and column of a tile: sixteen down before the next column, whose inputs stay in the L2 cache."""
    group = tile // (16 * across) * 16
    tall = tl.minimum(down - group, 16)
    return (group + tile % (16 * across) % tall) * BM, tile % (16 * across) // tall * BN


@jit
def _store(y, acc, row_start, column_start, BM: tl.constexpr, BN: tl.constexpr):
    left, right = halves(acc, BM, BN)
    y.store([row_start, column_start], left.to(y.dtype))
    y.store([row_start, column_start + BN // 2], right.to(y.dtype))


@jit
def _branch(
    x, W, Y, U, B, BIAS, first, row_count, width, outs, w_step, u_step, u_start, rank,
    RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """All tiles of one y; gives back the first tile that this program takes of the next."""
    w = _matrix(W, outs, width, w_step, BN, BK)
    y = _matrix(Y, row_count, outs, outs, BM, BN // 2)
    down, across = tl.cdiv(row_count, BM), tl.cdiv(outs, BN)
    for tile in tl.range(first, down * across, PROGRAMS):  # not flattened: Triton 3.6 then mixes up the tiles' u and b
        row_start, column_start = _place(tile, down, across, BM, BN)
        r, c, k = row_start + tl.arange(0, BM), column_start + tl.arange(0, BN), tl.arange(0, RANK)
        # asked for before the long sum and needed after it
        u = tl.load(
            U + r.to(tl.int64)[:, None] * u_step + u_start + k[None, :],
            mask=(r < row_count)[:, None] & (k < rank)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            B + c.to(tl.int64)[:, None] * rank + k[None, :], mask=(c < outs)[:, None] & (k < rank)[None, :], other=0.0
        )
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, width, BK):
            acc = tl.dot(x.load([row_start, start]), w.load([column_start, start]).T, acc)
        acc = tl.dot(u, b.T, acc)
        if BIAS is not None:
            acc += tl.load(BIAS + c, mask=c < outs, other=0.0).to(tl.float32)[None, :]
        _store(y, acc, row_start, column_start, BM, BN)
    return (first + PROGRAMS - down * across % PROGRAMS) % PROGRAMS


@jit
def _products_kernel(
    X, U, W_0, Y_0, B_0, BIAS_0, outs_0, step_0, rank_0, W_1, Y_1, B_1, BIAS_1, outs_1, step_1, rank_1,
    W_2, Y_2, B_2, BIAS_2, outs_2, step_2, rank_2, row_count, width, x_step, u_step, each,
    RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    x = _matrix(X, row_count, width, x_step, BM, BK)
    first = _branch(
        x, W_0, Y_0, U, B_0, BIAS_0, tl.program_id(0), row_count, width, outs_0, step_0, u_step, 0, rank_0,
        RANK, BM, BN, BK, PROGRAMS,
    )  # fmt: skip
    if W_1 is not None:
        first = _branch(
            x, W_1, Y_1, U, B_1, BIAS_1, first, row_count, width, outs_1, step_1, u_step, each, rank_1,
            RANK, BM, BN, BK, PROGRAMS,
        )  # fmt: skip
    if W_2 is not None:
        _branch(
            x, W_2, Y_2, U, B_2, BIAS_2, first, row_count, width, outs_2, step_2, u_step, 2 * each, rank_2,
            RANK, BM, BN, BK, PROGRAMS,
        )  # fmt: skip


@jit
def _add_product(acc, g, w, row_start, column_start, inner, BK: tl.constexpr):
    for k in range(0, inner, BK):
        acc = tl.dot(g.load([row_start, k]), w.load([k, column_start]), acc)
    return acc


@jit
def _input_gradient_kernel(
    DX, V, A, G_0, W_0, outs_0, g_0, w_0, G_1, W_1, outs_1, g_1, w_1, G_2, W_2, outs_2, g_2, w_2,
    row_count, width, ranks, v_step, RK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    dx = _matrix(DX, row_count, width, width, BM, BN // 2)
    grad_0, weight_0 = _matrix(G_0, row_count, outs_0, g_0, BM, BK), _matrix(W_0, outs_0, width, w_0, BK, BN)
    if G_1 is not None:
        grad_1, weight_1 = _matrix(G_1, row_count, outs_1, g_1, BM, BK), _matrix(W_1, outs_1, width, w_1, BK, BN)
    if G_2 is not None:
        grad_2, weight_2 = _matrix(G_2, row_count, outs_2, g_2, BM, BK), _matrix(W_2, outs_2, width, w_2, BK, BN)
    if V is not None:
        v, a = _matrix(V, row_count, ranks, v_step, BM, RK), _matrix(A, ranks, width, width, RK, BN)
    down, across = tl.cdiv(row_count, BM), tl.cdiv(width, BN)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS):
        row_start, column_start = _place(tile, down, across, BM, BN)
        acc = tl.zeros([BM, BN], tl.float32)
        acc = _add_product(acc, grad_0, weight_0, row_start, column_start, outs_0, BK)
        if G_1 is not None:
            acc = _add_product(acc, grad_1, weight_1, row_start, column_start, outs_1, BK)
        if G_2 is not None:
            acc = _add_product(acc, grad_2, weight_2, row_start, column_start, outs_2, BK)
        if V is not None:
            acc = _add_product(acc, v, a, row_start, column_start, ranks, RK)
        _store(dx, acc, row_start, column_start, BM, BN)


@jit
def _pass(
    G, B, B_PART, U, V_PART, block, v_part, row_count, split_rows, outs, g_step, u_step, u_start, each, rank,
    RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of columns of G over some of the rows: its part of dB, and, whole for these columns, v."""
    g, u = _matrix(G, row_count, outs, g_step, BM, BN), _matrix(U, row_count, u_start + each, u_step, BM, RANK)
    c, k = block * BN + tl.arange(0, BN), tl.arange(0, RANK)
    b = tl.load(
        B + c.to(tl.int64)[:, None] * rank + k[None, :], mask=(c < outs)[:, None] & (k < rank)[None, :], other=0.0
    )
    total = tl.zeros([BN, RANK], tl.float32)
    first = tl.program_id(1) * split_rows
    for row_start in range(first, tl.minimum(first + split_rows, row_count), BM):
        tile = g.load([row_start, block * BN])
        total = tl.dot(tile.T, u.load([row_start, u_start]), total)
        r = row_start + tl.arange(0, BM)
        at = (tl.zeros([BM], tl.int64) + v_part) * row_count + r
        mask = (r < row_count)[:, None] & (k < each)[None, :]
        tl.store(V_PART + at[:, None] * each + k[None, :], tl.dot(tile, b), mask=mask)
    at = (tl.program_id(1) * outs + c).to(tl.int64)[:, None] * each + k[None, :]
    tl.store(B_PART + at, total, mask=(c < outs)[:, None] & (k < each)[None, :])


@jit
def _pass_kernel(
    U, V_PART, G_0, B_0, PART_0, outs_0, step_0, rank_0, G_1, B_1, PART_1, outs_1, step_1, rank_1,
    G_2, B_2, PART_2, outs_2, step_2, rank_2, row_count, split_rows, u_step, each,
    RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of columns of one G after the other, by parts of the rows."""
    number = tl.program_id(0)
    blocks_0 = tl.cdiv(outs_0, BN)
    blocks_1 = 0
    if G_1 is not None:
        blocks_1 = tl.cdiv(outs_1, BN)
    if number < blocks_0:
        _pass(
            G_0, B_0, PART_0, U, V_PART, number, number, row_count, split_rows, outs_0, step_0, u_step, 0, each, rank_0,
            RANK, BM, BN,
        )  # fmt: skip
    if G_1 is not None:
        if (number >= blocks_0) & (number < blocks_0 + blocks_1):
            _pass(
                G_1, B_1, PART_1, U, V_PART, number - blocks_0, number, row_count, split_rows, outs_1, step_1, u_step,
                each, each, rank_1, RANK, BM, BN,
            )  # fmt: skip
    if G_2 is not None:
        if number >= blocks_0 + blocks_1:
            _pass(
                G_2, B_2, PART_2, U, V_PART, number - blocks_0 - blocks_1, number, row_count, split_rows, outs_2,
                step_2, u_step, 2 * each, each, rank_2, RANK, BM, BN,
            )  # fmt: skip
