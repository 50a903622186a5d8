"""Attention's Triton kernels and their launches; attention.py has the formulas.

A tile is ROWS queries and KEYS keys; offsets inside of it are 32 bits wide, those to its start 64.

Scores and lse are in units of 1 / UNIT. UNIT is log2(e), which the scale takes in, so that exp2 does; where scores are
wide it is 1, as finfo.min times log2(e) would be -inf.
"""

import math

import torch

from .common import ceil_div, jit, next_power_of_2, tanh, tl

LOG2_E = 1.4426950408889634


@jit
def _place(tiles, heads):
    """(tile, head, batch) of this program."""
    program = tl.program_id(0)
    return program % tiles, program // tiles % heads, program // tiles // heads


@jit
def _start(X, batch, head, row, batch_step, head_step, row_step):
    offset = tl.cast(batch, tl.int64) * batch_step + tl.cast(head, tl.int64) * head_step
    return X + (offset + tl.cast(row, tl.int64) * row_step)


@jit
def _load(X, row, left, step, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a matrix, [rows, BLOCK]: 0 beyond WIDTH and, if MASKED, from row `left` on."""
    column = tl.arange(0, BLOCK)[None, :]
    at = X + (row[:, None] * step + column)
    if MASKED:
        x = tl.load(at, mask=(row < left)[:, None] & (column < WIDTH), other=0.0)
    elif WIDTH < BLOCK:
        x = tl.load(at, mask=column < WIDTH, other=0.0)
    else:
        x = tl.load(at)
    return x


@jit
def _store(X, x, row, left, step, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    tl.store(X + (row[:, None] * step + column), x, mask=(row < left)[:, None] & (column < WIDTH))


@jit
def _load_scores(X, batch, head, first_i, first_j, i, j, inside, other, b, h, q, k):
    """A tile of a tensor over scores; i and j are queries and keys from the tile's first on, shaped to be broadcast."""
    X = _start(_start(X, batch, head, first_i, b, h, q), 0, 0, first_j, 0, 0, k)
    return tl.load(X + (i * q + j * k), mask=inside, other=other)


@jit
def _load_sink(SINK, batch, head, first, row, left, b, h, q):
    return tl.load(_start(SINK, batch, head, first, b, h, q) + row * q, mask=row < left, other=0.0).to(tl.float32)


@jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@jit
def _exp(x, UNIT: tl.constexpr):
    return tl.exp(x) if UNIT == 1.0 else tl.exp2(x)


@jit
def _probability(s, lse, log_sum, UNIT: tl.constexpr, HIDES: tl.constexpr):
    """exp(s - lse), or where UNIT is 1, and lse the maximum, exp(s - maximum - log_sum).

    HIDES: 0 for what is hidden, also where a query sees no key, so that lse is -inf.
    """
    p = tl.exp((s - lse) - log_sum) if UNIT == 1.0 else tl.exp2(s - lse)
    return tl.where(s == float("-inf"), 0.0, p) if HIDES else p


@jit
def _score(
    z, BIAS, VISIBLE, MULTIPLIER, batch, head, first_i, first_j, i, j, inside,
    bias_b, bias_h, bias_q, bias_k, shown_b, shown_h, shown_q, shown_k, times_b, times_h, times_q, times_k,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, FILL: tl.constexpr, FILL_FIRST: tl.constexpr, FLOOR: tl.constexpr,
    UNIT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """(s of z = q k^T, its derivative over SCALE, that over the bias). BIAS, VISIBLE, MULTIPLIER, FLOOR may be None.

    FILL: None hides what is not VISIBLE; derivatives leave out that it has none, as its probability is 0.
    NARROW: tanh is right to 1e-7 of 1, not of itself; operands of 16 bits don't resolve the difference.
    """
    slope, gate = 1.0, 1.0
    if SOFTCAP != 0.0:
        if NARROW:
            t = 1 - 2 / (1 + tl.exp2(z * (2 * 1.4426950408889634 * SCALE / SOFTCAP)))
        else:
            t = tanh(z * (SCALE / SOFTCAP))
        s = t * (SOFTCAP * UNIT)
        slope = 1 - t * t
    else:
        s = z * (SCALE * UNIT)
    if MULTIPLIER is not None:
        factor = _load_scores(
            MULTIPLIER, batch, head, first_i, first_j, i, j, inside, 0.0, times_b, times_h, times_q, times_k
        ).to(tl.float32)  # fmt: skip
        s, slope = s * factor, slope * factor
    if VISIBLE is not None:
        shown = _load_scores(
            VISIBLE, batch, head, first_i, first_j, i, j, inside, 1, shown_b, shown_h, shown_q, shown_k
        ) != 0  # fmt: skip
        if FILL is None:
            s = tl.where(shown, s, float("-inf"))
        elif FILL_FIRST:
            s, slope = tl.where(shown, s, FILL), tl.where(shown, slope, 0.0)
    if BIAS is not None:
        bias = _load_scores(BIAS, batch, head, first_i, first_j, i, j, inside, 0.0, bias_b, bias_h, bias_q, bias_k)
        s += bias.to(tl.float32)
    if VISIBLE is not None and FILL is not None and not FILL_FIRST:
        s, gate = tl.where(shown, s, FILL), tl.where(shown, 1.0, 0.0)
    if FLOOR is not None:
        gate = tl.where(s >= FLOOR, gate, 0.0)
        s = tl.maximum(s, FLOOR)
    return s, slope, gate


@jit
def _hide(s, i, j, k_count, CAUSAL: tl.constexpr):
    s = tl.where(j < k_count, s, float("-inf"))
    if CAUSAL:
        s = tl.where(j <= i, s, float("-inf"))
    return s


@jit
def _ends(first, k_count, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr):
    """(end of the tiles of keys that the queries from `first` on see whole, end of those that they see at all)."""
    full, end = k_count // KEYS * KEYS, k_count
    if CAUSAL:
        full, end = tl.minimum(full, (first + 1) // KEYS * KEYS), tl.minimum(end, first + ROWS)
    return full, end


@jit
def _forward_kernel(
    Q, K, V, BIAS, VISIBLE, SINK, KEEP, MULTIPLIER, OUT, LSE, LOG_SUM, heads, group, q_count, k_count,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_q, bias_k, shown_b, shown_h, shown_q, shown_k,
    keep_b, keep_h, keep_q, keep_k, times_b, times_h, times_q, times_k, sink_b, sink_h, sink_q,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, FILL: tl.constexpr, FILL_FIRST: tl.constexpr,
    FLOOR: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, NARROW: tl.constexpr, EVEN: tl.constexpr,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of queries. Tensors over scores and SINK may be None. EVEN: k_count is a multiple of 16: wider loads."""
    k_count = k_count // 16 * 16 if EVEN else k_count
    tiles = tl.cdiv(q_count, ROWS)
    tile, head, batch = _place(tiles, heads)
    if CAUSAL:
        tile = tiles - 1 - tile  # those with the most keys start first
    first = tile * ROWS
    row, key, left = tl.arange(0, ROWS), tl.arange(0, KEYS), q_count - first
    i, j = row[:, None], key[None, :]
    q = _load(_start(Q, batch, head, first, q_b, q_h, q_t), row, left, q_t, WIDTH, BLOCK, True)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINK is not None:
        largest = _load_sink(SINK, batch, head, first, row, left, sink_b, sink_h, sink_q) * UNIT
        total += tl.where(largest == float("-inf"), 0.0, 1.0)
    out = tl.zeros([ROWS, V_BLOCK], tl.float32)
    full, end = _ends(first, k_count, ROWS, KEYS, CAUSAL)
    for EDGE in tl.static_range(2):  # whole tiles of keys, then those at the diagonal and the last key
        for start in range(full if EDGE else 0, end if EDGE else full, KEYS):
            behind = k_count - start
            inside = (i < left) & (j < behind) if EDGE else i < left
            k_at = _start(K, batch, head // group, start, k_b, k_h, k_t)
            k = _load(k_at, key, behind, k_t, WIDTH, BLOCK, EDGE)
            s, _, _ = _score(
                _dot(q, tl.trans(k)), BIAS, VISIBLE, MULTIPLIER, batch, head, first, start, i, j, inside,
                bias_b, bias_h, bias_q, bias_k, shown_b, shown_h, shown_q, shown_k, times_b, times_h, times_q, times_k,
                SCALE, SOFTCAP, FILL, FILL_FIRST, FLOOR, UNIT, NARROW,
            )  # fmt: skip
            if EDGE:
                s = _hide(s, i + first, j + start, k_count, CAUSAL)
            new = tl.maximum(largest, tl.max(s, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # while nothing is visible: no -inf - -inf
            p = _exp(s - base[:, None], UNIT)
            shrink = _exp(largest - base, UNIT)
            largest, total = new, total * shrink + tl.sum(p, 1)
            if KEEP is not None:
                kept = _load_scores(
                    KEEP, batch, head, first, start, i, j, inside, 0, keep_b, keep_h, keep_q, keep_k
                )  # fmt: skip
                p = tl.where(kept != 0, p, 0.0)
            v_at = _start(V, batch, head // group, start, v_b, v_h, v_t)
            v = _load(v_at, key, behind, v_t, V_WIDTH, V_BLOCK, EDGE)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    out *= (FACTOR / total)[:, None]
    at = tl.cast(batch * heads + head, tl.int64) * q_count + first
    _store(OUT + at * V_WIDTH, out, row, left, V_WIDTH, V_WIDTH, V_BLOCK)
    lse, log_sum = tl.where(largest == float("-inf"), 0.0, largest), tl.log(total) * UNIT
    if LOG_SUM is not None:
        tl.store(LOG_SUM + at + row, log_sum, mask=row < left)
    else:
        lse += log_sum
    tl.store(LSE + at + row, lse, mask=row < left)


@jit
def _query_kernel(
    DOUT, Q, K, V, BIAS, VISIBLE, SINK, KEEP, MULTIPLIER, OUT, LSE, LOG_SUM, DELTA, DSINK, DS, DQ,
    heads, group, q_count, k_count,
    o_b, o_h, o_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_q, bias_k,
    shown_b, shown_h, shown_q, shown_k, keep_b, keep_h, keep_q, keep_k, times_b, times_h, times_q, times_k,
    dq_b, dq_h, dq_t, sink_b, sink_h, sink_q,
    PASSES: tl.constexpr, FACTOR: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, FILL: tl.constexpr,
    FILL_FIRST: tl.constexpr, FLOOR: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, NARROW: tl.constexpr,
    EVEN: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """delta of a tile of queries, and what is not None of: dq, ds [B, H, Tq, Tk], dsink [B, H, Tq].

    Gradients of a sink, and of a bias that is the same for all keys, are what nearly cancels between p dp and delta:
    for these alone delta is the sum of the former, not rowsum(do * o), as o has been rounded. For ds that takes a pass
    of its own.
    """
    k_count = k_count // 16 * 16 if EVEN else k_count
    tiles = tl.cdiv(q_count, ROWS)
    tile, head, batch = _place(tiles, heads)
    if CAUSAL:
        tile = tiles - 1 - tile
    first = tile * ROWS
    row, key, left = tl.arange(0, ROWS), tl.arange(0, KEYS), q_count - first
    i, j = row[:, None], key[None, :]
    at = tl.cast(batch * heads + head, tl.int64) * q_count + first
    do = _load(_start(DOUT, batch, head, first, o_b, o_h, o_t), row, left, o_t, V_WIDTH, V_BLOCK, True)
    o = _load(OUT + at * V_WIDTH, row, left, V_WIDTH, V_WIDTH, V_BLOCK, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(LSE + at + row, mask=row < left, other=0.0)
    log_sum = tl.load(LOG_SUM + at + row, mask=row < left, other=0.0) if LOG_SUM is not None else lse
    HIDES: tl.constexpr = VISIBLE is not None and FILL is None
    if HIDES:
        delta = tl.where(log_sum == float("-inf"), 0.0, delta)  # of a query that sees no key, whose result is NaN
    tl.store(DELTA + at + row, delta, mask=row < left)
    if DQ is not None or DS is not None or DSINK is not None:
        do = do.to(V.dtype.element_ty)
        q = _load(_start(Q, batch, head, first, q_b, q_h, q_t), row, left, q_t, WIDTH, BLOCK, True)
        dq = tl.zeros([ROWS, BLOCK], tl.float32)
        exact = tl.zeros([ROWS], tl.float32)
        full, end = _ends(first, k_count, ROWS, KEYS, CAUSAL)
        for PASS in tl.static_range(PASSES):
            for EDGE in tl.static_range(2):
                for start in range(full if EDGE else 0, end if EDGE else full, KEYS):
                    behind = k_count - start
                    inside = (i < left) & (j < behind) if EDGE else i < left
                    k_at = _start(K, batch, head // group, start, k_b, k_h, k_t)
                    v_at = _start(V, batch, head // group, start, v_b, v_h, v_t)
                    k = _load(k_at, key, behind, k_t, WIDTH, BLOCK, EDGE)
                    v = _load(v_at, key, behind, v_t, V_WIDTH, V_BLOCK, EDGE)
                    s, slope, gate = _score(
                        _dot(q, tl.trans(k)), BIAS, VISIBLE, MULTIPLIER, batch, head, first, start, i, j, inside,
                        bias_b, bias_h, bias_q, bias_k, shown_b, shown_h, shown_q, shown_k,
                        times_b, times_h, times_q, times_k, SCALE, SOFTCAP, FILL, FILL_FIRST, FLOOR, UNIT, NARROW,
                    )  # fmt: skip
                    if EDGE:
                        s = _hide(s, i + first, j + start, k_count, CAUSAL)
                    dp = _dot(do, tl.trans(v))
                    if KEEP is not None:
                        kept = _load_scores(
                            KEEP, batch, head, first, start, i, j, inside, 0, keep_b, keep_h, keep_q, keep_k
                        )  # fmt: skip
                        dp = tl.where(kept != 0, dp * FACTOR, 0.0)
                    p = _probability(s, lse[:, None], log_sum[:, None], UNIT, HIDES)
                    if PASS == 0 and (DS is not None or DSINK is not None):
                        exact += tl.sum(p * dp, 1)
                    if PASS == PASSES - 1:
                        if DS is not None:
                            ds = p * (dp - exact[:, None]) * gate
                            tl.store(DS + (at * k_count + start) + (i * k_count + j), ds, mask=inside)
                        if DQ is not None:
                            ds = p * (dp - delta[:, None]) * gate
                            dq = tl.dot((ds * slope).to(k.dtype), k, dq, input_precision="ieee")
        if DQ is not None:
            _store(_start(DQ, batch, head, first, dq_b, dq_h, dq_t), dq * SCALE, row, left, dq_t, WIDTH, BLOCK)
        if DSINK is not None:
            sink = _load_sink(SINK, batch, head, first, row, left, sink_b, sink_h, sink_q) * UNIT
            tl.store(DSINK + at + row, -_probability(sink, lse, log_sum, UNIT, False) * exact, mask=row < left)


@jit
def _key_kernel(
    DOUT, Q, K, V, BIAS, VISIBLE, KEEP, MULTIPLIER, LSE, LOG_SUM, DELTA, DK, DV, groups, group, q_count, k_count,
    o_b, o_h, o_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_q, bias_k,
    shown_b, shown_h, shown_q, shown_k, keep_b, keep_h, keep_q, keep_k, times_b, times_h, times_q, times_k,
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, FILL: tl.constexpr, FILL_FIRST: tl.constexpr,
    FLOOR: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, NARROW: tl.constexpr, EVEN: tl.constexpr,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """What is not None of dk and dv of a tile of keys. Scores are transposed, [KEYS, ROWS], as both products take them.

    What lies beyond the last key needs no mask, as it stays in rows that are not stored, nor what lies beyond the last
    query, whose do and delta are 0. The loop runs over heads and tiles at once: as two it would need more registers.
    """
    k_count = k_count // 16 * 16 if EVEN else k_count
    tile, kv_head, batch = _place(tl.cdiv(k_count, KEYS), groups)
    first = tile * KEYS
    row, key, behind = tl.arange(0, ROWS), tl.arange(0, KEYS), k_count - first
    i, j = row[None, :], key[:, None]
    k = _load(_start(K, batch, kv_head, first, k_b, k_h, k_t), key, behind, k_t, WIDTH, BLOCK, True)
    v = _load(_start(V, batch, kv_head, first, v_b, v_h, v_t), key, behind, v_t, V_WIDTH, V_BLOCK, True)
    dk = tl.zeros([KEYS, BLOCK], tl.float32)
    dv = tl.zeros([KEYS, V_BLOCK], tl.float32)
    lowest = tl.minimum(first, q_count) // ROWS if CAUSAL else 0  # earlier queries see none of these keys
    tiles = tl.cdiv(q_count, ROWS) - lowest
    for step in range(group * tiles):
        head, start = kv_head * group + step // tiles, (lowest + step % tiles) * ROWS
        left = q_count - start
        inside = (i < left) & (j < behind)
        q = _load(_start(Q, batch, head, start, q_b, q_h, q_t), row, left, q_t, WIDTH, BLOCK, True)
        do = _load(_start(DOUT, batch, head, start, o_b, o_h, o_t), row, left, o_t, V_WIDTH, V_BLOCK, True)
        do = do.to(v.dtype)
        at = tl.cast(batch * groups * group + head, tl.int64) * q_count + start
        lse = tl.load(LSE + at + row, mask=row < left, other=0.0)
        log_sum = tl.load(LOG_SUM + at + row, mask=row < left, other=0.0) if LOG_SUM is not None else lse
        delta = tl.load(DELTA + at + row, mask=row < left, other=0.0)
        s, slope, gate = _score(
            _dot(k, tl.trans(q)), BIAS, VISIBLE, MULTIPLIER, batch, head, start, first, i, j, inside,
            bias_b, bias_h, bias_q, bias_k, shown_b, shown_h, shown_q, shown_k, times_b, times_h, times_q, times_k,
            SCALE, SOFTCAP, FILL, FILL_FIRST, FLOOR, UNIT, NARROW,
        )  # fmt: skip
        if CAUSAL:
            s = tl.where(j + first <= i + start, s, float("-inf"))
        p = _probability(s, lse[None, :], log_sum[None, :], UNIT, VISIBLE is not None and FILL is None)
        dp = _dot(v, tl.trans(do))
        dropped = p
        if KEEP is not None:
            kept = _load_scores(KEEP, batch, head, start, first, i, j, inside, 0, keep_b, keep_h, keep_q, keep_k) != 0
            dropped, dp = tl.where(kept, p * FACTOR, 0.0), tl.where(kept, dp * FACTOR, 0.0)
        if DV is not None:
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
        if DK is not None:
            dk = tl.dot((p * (dp - delta[None, :]) * (gate * slope)).to(q.dtype), q, dk, input_precision="ieee")
    if DK is not None:
        _store(_start(DK, batch, kv_head, first, dk_b, dk_h, dk_t), dk * SCALE, key, behind, dk_t, WIDTH, BLOCK)
    if DV is not None:
        _store(_start(DV, batch, kv_head, first, dv_b, dv_h, dv_t), dv, key, behind, dv_t, V_WIDTH, V_BLOCK)


# (ROWS, KEYS, warps, stages) of the forward, query and key kernels by the widest head, first without tensors over all
# scores, then with one. A warp takes 16 rows of a product. TILES fits in 99 KiB; float32 has no tensor cores.
TILES = {
    64: (((128, 64, 8, 2), (128, 32, 8, 2), (32, 128, 8, 2)), ((128, 64, 8, 2), (128, 32, 8, 2), (16, 64, 4, 2))),
    128: (((128, 32, 8, 2), (64, 32, 4, 2), (32, 64, 4, 1)), ((128, 32, 8, 2), (64, 32, 8, 2), (16, 64, 8, 2))),
    256: (((64, 16, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)), ((64, 16, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2))),
}
TILES_OF_WARPGROUPS = {
    64: (((128, 64, 8, 3), (128, 32, 8, 2), (32, 128, 8, 2)),) * 2,
    128: (((128, 64, 8, 3), (128, 32, 8, 2), (32, 128, 8, 2)), ((128, 32, 8, 2), (128, 32, 8, 2), (16, 64, 4, 2))),
    256: (((128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 8, 2)), ((128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2))),
}
TILES_OF_FLOAT32 = {
    64: (((32, 32, 8, 1),) * 3,) * 2,
    128: (((32, 32, 16, 1), (32, 32, 16, 1), (32, 16, 8, 1)),) * 2,
}


def has_warpgroups(x):
    """Whether tensor cores read operands from shared memory (Hopper, data centre Blackwell), which spares registers."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def _operand(x):
    """A matrix with its steps: copied if its last dimension is not contiguous or offsets in a tile could pass 2^31."""
    x = x if x.stride(-1) == 1 and x.stride(2) < 1 << 23 else x.contiguous()
    return x, *x.stride()[:3]


def _result(gradient):
    """What a kernel writes a gradient to, itself or a buffer, with its steps."""
    if gradient is None:
        return None, 0, 0, 0
    fits = gradient.stride(-1) == 1 and gradient.stride(2) < 1 << 23
    buffer = gradient if fits else torch.empty_like(gradient, memory_format=torch.contiguous_format)
    return buffer, *buffer.stride()[:3]


def _over_scores(x, scores):
    """bias, keep or multiplier with the steps by which it broadcasts to [B, H, Tq, Tk]; sink to [B, H, Tq]."""
    if x is None:
        return None, *[0] * len(scores)
    x = x if max(x.stride()[-2:], default=0) < 1 << 23 else x.contiguous()
    return x, *x.expand(scores).stride()


def _unless_infinite(number):
    return None if number == -math.inf else number


def _launch_options(q, k, v, over_scores, wide, options):
    """(what the three kernels are all given, tiles of each)."""
    width, v_width = q.shape[-1], v.shape[-1]
    block, v_block = (max(16, next_power_of_2(n)) for n in (width, v_width))
    over_scores = any(t is not None for t in over_scores)
    given = dict(
        FACTOR=options["factor"], SCALE=options["scale"], SOFTCAP=options["softcap"],
        FILL=_unless_infinite(options["fill"]), FILL_FIRST=options["fill_first"],
        FLOOR=_unless_infinite(options["floor"]), CAUSAL=options["is_causal"], UNIT=1.0 if wide else LOG2_E,
        NARROW=q.dtype is not torch.float32, EVEN=over_scores and k.shape[2] % 16 == 0,
        WIDTH=width, V_WIDTH=v_width, BLOCK=block, V_BLOCK=v_block,
    )  # fmt: skip
    table = TILES_OF_WARPGROUPS if has_warpgroups(q) else TILES
    table = TILES_OF_FLOAT32 if torch.float32 in (q.dtype, k.dtype, v.dtype) else table
    names = ("ROWS", "KEYS", "num_warps", "num_stages")
    tiles = table[max(64, block, v_block)][over_scores]
    return given, [dict(zip(names, tile, strict=True)) for tile in tiles]


def forward(q, k, v, bias, visible, sink, keep, multiplier, out, stats, options):
    """Write out and stats."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    dtype, scores = torch.promote_types(q.dtype, k.dtype), (batch, heads, queries, keys)
    (q, *q_steps), (k, *k_steps), (v, *v_steps) = _operand(q.to(dtype)), _operand(k.to(dtype)), _operand(v)
    (bias, *bias_steps), (visible, *shown_steps) = _over_scores(bias, scores), _over_scores(visible, scores)
    (keep, *keep_steps), (multiplier, *steps) = _over_scores(keep, scores), _over_scores(multiplier, scores)
    sink, *sink_steps = _over_scores(sink, scores[:3])
    given, (tile, _, _) = _launch_options(q, k, v, (bias, visible, keep, multiplier), len(stats) == 2, options)
    _forward_kernel[(batch * heads * ceil_div(queries, tile["ROWS"]),)](
        q, k, v, bias, visible, sink, keep, multiplier, out, *(*stats, None)[:2], heads, heads // k.shape[1], queries,
        keys, *q_steps, *k_steps, *v_steps, *bias_steps, *shown_steps, *keep_steps, *steps, *sink_steps, **given,
        **tile,
    )  # fmt: skip


def backward(dout, q, k, v, bias, visible, sink, keep, multiplier, out, stats, options, *grads):
    """Write the gradients of q, k, v, bias and sink that are not None."""
    (batch, heads, queries, _), (_, groups, keys, _) = q.shape, k.shape
    dtype, scores = torch.promote_types(q.dtype, k.dtype), (batch, heads, queries, keys)
    *matrix_grads, dbias, dsink = grads
    (q, *q_steps), (k, *k_steps), (v, *v_steps) = _operand(q.to(dtype)), _operand(k.to(dtype)), _operand(v)
    (bias, *bias_steps), (visible, *shown_steps) = _over_scores(bias, scores), _over_scores(visible, scores)
    (keep, *keep_steps), (multiplier, *steps) = _over_scores(keep, scores), _over_scores(multiplier, scores)
    sink, *sink_steps = _over_scores(sink, scores[:3])
    (dq, *dq_steps), (dk, *dk_steps), (dv, *dv_steps) = map(_result, matrix_grads)
    dout, *o_steps = _operand(dout)
    over_scores = (bias, visible, keep, multiplier)
    given, (_, q_tile, k_tile) = _launch_options(q, k, v, over_scores, len(stats) == 2, options)
    if dbias is not None or dsink is not None:  # what these take besides would not fit in registers
        if given["NARROW"]:
            q_tile["KEYS"] //= 2
        elif max(given["BLOCK"], given["V_BLOCK"]) > 64:
            q_tile["num_warps"] *= 2
    q_tiles, k_tiles = ceil_div(queries, q_tile["ROWS"]), ceil_div(keys, k_tile["KEYS"])
    delta = torch.empty_like(stats[0])
    ds, shares = None, None
    if dbias is not None:
        ds = dbias if dbias.shape == scores and dbias.is_contiguous() else delta.new_empty(scores)
        if options["is_causal"]:
            ds.zero_()  # tiles beyond the diagonal are skipped
    if dsink is not None:
        shares = torch.empty_like(delta)
    stats = (*stats, None)[:2]
    shared = (heads // groups, queries, keys, *o_steps, *q_steps, *k_steps, *v_steps, *bias_steps, *shown_steps)
    shared += (*keep_steps, *steps)
    _query_kernel[(batch * heads * q_tiles,)](
        dout, q, k, v, bias, visible, sink, keep, multiplier, out, *stats, delta, shares, ds, dq, heads, *shared,
        *dq_steps, *sink_steps, PASSES=1 + (ds is not None), **given, **q_tile,
    )  # fmt: skip
    if dk is not None or dv is not None:
        _key_kernel[(batch * groups * k_tiles,)](
            dout, q, k, v, bias, visible, keep, multiplier, *stats, delta, dk, dv, groups, *shared, *dk_steps,
            *dv_steps, **given, **k_tile,
        )  # fmt: skip
    for gradient, buffer in zip(matrix_grads, (dq, dk, dv), strict=True):
        if buffer is not gradient:
            gradient.copy_(buffer)
    if dsink is not None:
        dsink.copy_(shares.sum_to_size(dsink.shape))
    if dbias is not None and ds is not dbias:
        dbias.copy_(ds.sum_to_size(dbias.shape))
