"""Products of one input with several frozen weights, each with its low-rank branch added before anything is rounded.

    y_i = x W_i^T + u_i B_i^T (+ bias_i)

One launch for all of them, on Hopper: the tiles of one follow those of the other without a gap.
"""

import torch

from .common import (
    halves,
    has_aligned_rows,
    has_tensor_memory_accelerator,
    jit,
    next_power_of_2,
    processors,
    tiles,
    tl,
)

TILE = (128, 256, 64)
MOST_BRANCHES, MOST_RANK = 3, 64


def suits(x, weights, ranks):
    """Whether `products` does it: bfloat16 on Hopper, few branches of a low rank, rows that start at 16 bytes."""
    return (
        has_tensor_memory_accelerator(x)
        and x.dtype is torch.bfloat16
        and len(weights) <= MOST_BRANCHES
        and max(ranks) <= MOST_RANK
        and all(has_aligned_rows(t) for t in (x, *weights))
        and all(len(w) % 8 == 0 for w in weights)
        and x.numel() > 0
    )


def products(x, weights, biases, u, up):
    """The y_i of x [T, D], weights [N_i, D], u [T, branches * R] with a part for each branch, and up [N_i, R_i]."""
    BM, BN, BK = TILE
    rows, width = x.shape
    each = u.shape[1] // len(weights)
    outputs = [x.new_empty(rows, len(w)) for w in weights]

    branches = []
    for w, y, b, bias in zip(weights, outputs, up, biases, strict=True):
        branches += [tiles(w, BN, BK), tiles(y, BM, BN // 2), b, bias, len(w), b.shape[1]]
    branches += [None] * (6 * (MOST_BRANCHES - len(weights)))
    _products_kernel[(processors(x),)](
        tiles(x, BM, BK), u, *branches, rows, width, u.stride(0), each,
        RANK=max(16, next_power_of_2(max(b.shape[1] for b in up))), BM=BM, BN=BN, BK=BK, PROGRAMS=processors(x),
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return outputs


@jit
def _branch(
    x_desc, w_desc, y_desc, U, B, BIAS, first, rows, width, outs, u_step, u_start, rank,
    RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """All tiles of one y; gives back the first tile that this program takes of the next."""
    down, across = tl.cdiv(rows, BM), tl.cdiv(outs, BN)
    for tile in tl.range(first, down * across, PROGRAMS):  # not flattened: Triton 3.6 then mixes up the tiles' u and b
        # sixteen tiles down before the next column: their inputs and the weights stay in the L2 cache
        group = tile // (16 * across) * 16
        tall = tl.minimum(down - group, 16)
        row_start = (group + tile % (16 * across) % tall) * BM
        column_start = tile % (16 * across) // tall * BN
        r, c, k = row_start + tl.arange(0, BM), column_start + tl.arange(0, BN), tl.arange(0, RANK)
        # asked for before the long sum and needed after it
        u = tl.load(
            U + r.to(tl.int64)[:, None] * u_step + u_start + k[None, :],
            mask=(r < rows)[:, None] & (k < rank)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            B + c.to(tl.int64)[:, None] * rank + k[None, :], mask=(c < outs)[:, None] & (k < rank)[None, :], other=0.0
        )
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, width, BK):
            acc = tl.dot(x_desc.load([row_start, start]), w_desc.load([column_start, start]).T, acc)
        acc = tl.dot(u, b.T, acc)
        if BIAS is not None:
            acc += tl.load(BIAS + c, mask=c < outs, other=0.0).to(tl.float32)[None, :]
        left, right = halves(acc, BM, BN)
        y_desc.store([row_start, column_start], left.to(y_desc.dtype))
        y_desc.store([row_start, column_start + BN // 2], right.to(y_desc.dtype))
    return (first + PROGRAMS - down * across % PROGRAMS) % PROGRAMS


@jit
def _products_kernel(
    x_desc, U, w_0, y_0, B_0, BIAS_0, outs_0, rank_0, w_1, y_1, B_1, BIAS_1, outs_1, rank_1, w_2, y_2, B_2, BIAS_2,
    outs_2, rank_2, rows, width, u_step, each,
    RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    first = _branch(
        x_desc, w_0, y_0, U, B_0, BIAS_0, tl.program_id(0), rows, width, outs_0, u_step, 0, rank_0,
        RANK, BM, BN, BK, PROGRAMS,
    )  # fmt: skip
    if w_1 is not None:
        first = _branch(
            x_desc, w_1, y_1, U, B_1, BIAS_1, first, rows, width, outs_1, u_step, each, rank_1,
            RANK, BM, BN, BK, PROGRAMS,
        )  # fmt: skip
    if w_2 is not None:
        _branch(
            x_desc, w_2, y_2, U, B_2, BIAS_2, first, rows, width, outs_2, u_step, 2 * each, rank_2,
            RANK, BM, BN, BK, PROGRAMS,
        )  # fmt: skip
