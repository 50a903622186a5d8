"""Attention beyond scaled_dot_product_attention: a cap on the scores, sinks, biases of any shape, dropout with a bias.

    s = softcap(scale * q k^T) + bias,  softcap(z) = c tanh(z / c)
    p = exp(s - lse),  lse = log(sum over keys exp(s) + exp(sink))         a sink takes its share but has no value
    o = (p * keep / (1 - dropout)) v

Forward keeps one tile of scores at a time: a running maximum m and sum, by which what was added up so far is corrected
(online softmax; Milakov and Gimelshein, 2018), as in FlashAttention-2 (Dao, 2023). Backward computes p anew from m and
log-sum. With dp = (do v^T) * keep / (1 - dropout) and delta = rowsum(do * o), which is rowsum(p * dp),

    ds = p * (dp - delta)         dz = ds * (1 - (s' / c)^2) * scale,  s' = the capped score without the bias
    dq = dz k        dk = dz^T q        dv = (p * keep / (1 - dropout))^T do        dbias = ds, summed where it was broadcast
    dsink = -sum over queries exp(sink - lse) * delta

One kernel runs over the keys of a tile of queries, for dq and dbias, another over the queries of all heads that share a
tile of keys, for dk and dv: no atomics, bit-equal on repeat. m and the log of the sum are kept apart, since a bias that
hides by a large finite number (finfo.min) makes m so large that their sum would be m.
"""

import torch
from torch.autograd.function import once_differentiable

from .common import (
    INTERPRET,
    ceil_div,
    compute_dtype,
    jit,
    next_power_of_2,
    no_autocast,
    on_device,
    register,
    tanh,
    tl,
    traceable,
    use_triton,
)

LOG2_E = 1.4426950408889634
SCORES = 1 << 22  # how many the reference computes at a time


@traceable
def attention(
    q, k, v, *, bias=None, sink=None, keep=None, dropout=0.0, scale=None, softcap=None, is_causal=False, out_dtype=None
):  # fmt: skip
    """softmax(softcap(scale * q k^T) + bias) v, computed in float32 (float64 for float64 tensors), never whole in memory.

    q: [B, H, Tq, D], k: [B, G, Tk, D], v: [B, G, Tk, Dv], H a multiple of G: query head h reads head h // (H // G) of k
    and v. Any strides; one of 1 in the last dimension avoids a copy. Returns [B, H, Tq, Dv], contiguous, in out_dtype,
    default the promoted dtype of q, k and v. scale: default D**-0.5. softcap: Python number, None or 0 for none.
    bias: broadcasts to [B, H, Tq, Tk] and is never expanded; floats are added, booleans are True where a key is visible.
    is_causal: query i sees keys 0 to i, whatever Tq and Tk are. sink: [H], one more score of each head.
    keep: bool [B, H, Tq, Tk], the probabilities that dropout leaves; these are multiplied by 1 / (1 - dropout).
    A query that sees no key is NaN, as softmax has it, and so are the gradients of what it meets; with a sink it is 0.
    Triton's kernels round probabilities to v.dtype before they multiply v. float64 and D or Dv above 256: the reference.
    Gradients: q, k, v, sink and a float bias, each in its own dtype. Saves the tensors given, the result and two numbers
    for each of its rows; only the gradient of a bias takes memory for all scores. Raises ValueError for other shapes.
    """
    _check(q, k, v, bias, sink, keep, dropout)
    out_dtype = out_dtype or torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    scale, softcap = None if scale is None else float(scale), float(softcap) if softcap else None
    return _Attention.apply(q, k, v, bias, sink, keep, float(dropout), scale, softcap, is_causal, out_dtype)


def _check(q, k, v, bias, sink, keep, dropout):
    if any(t.dim() != 4 for t in (q, k, v)):
        raise ValueError(f"q, k and v must have 4 dimensions, not {q.dim()}, {k.dim()} and {v.dim()}")
    (batch, heads, queries, width), (_, groups, keys, _) = q.shape, k.shape
    if k.shape != (batch, groups, keys, width) or v.shape[:3] != k.shape[:3]:
        shapes = [list(t.shape) for t in (q, k, v)]
        raise ValueError(f"q, k and v must be [B, H, Tq, D], [B, G, Tk, D] and [B, G, Tk, Dv], not {shapes}")
    if groups == 0 or heads % groups:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, not {heads} of {groups}")
    scores = (batch, heads, queries, keys)
    if bias is not None:
        if not (bias.dtype is torch.bool or bias.dtype.is_floating_point):
            raise ValueError(f"bias must be of floats or booleans, not {bias.dtype}")
        if bias.dim() > 4 or any(n not in (1, m) for n, m in zip(bias.shape[::-1], scores[::-1], strict=False)):
            raise ValueError(f"bias must broadcast to {list(scores)}, its shape is {list(bias.shape)}")
    if sink is not None and sink.shape != (heads,):
        raise ValueError(f"sink must have shape [{heads}], not {list(sink.shape)}")
    if keep is not None and (keep.shape != scores or keep.dtype is not torch.bool):
        raise ValueError(f"keep must be booleans of shape {list(scores)}, not {keep.dtype} of {list(keep.shape)}")
    if not 0 <= dropout <= 1 or (dropout and keep is None):
        raise ValueError(f"dropout must be in [0, 1], and 0 without keep, not {dropout}")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, sink, keep, dropout, scale, softcap, is_causal, out_dtype):
        ctx.options = (dropout, scale, softcap, is_causal)
        out, stats = _forward_op(q, k, v, bias, sink, keep, *ctx.options, out_dtype)
        ctx.save_for_backward(q, k, v, bias, sink, keep, out, stats)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        needs = ctx.needs_input_grad[:5]
        grads = _backward_op(dout, *ctx.saved_tensors, *ctx.options, *needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 6


def _forward_fake(q, k, v, bias, sink, keep, dropout, scale, softcap, is_causal, out_dtype):
    out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=out_dtype)
    return out, q.new_empty(2, *q.shape[:3], dtype=compute_dtype(q, k, v, bias, sink))


def _backward_fake(dout, q, k, v, bias, sink, keep, out, stats, dropout, scale, softcap, is_causal, *needs):
    return tuple(
        torch.empty_like(t) if need else q.new_empty(0) for t, need in zip((q, k, v, bias, sink), needs, strict=True)
    )


def _forward(q, k, v, bias, sink, keep, dropout, scale, softcap, is_causal, out_dtype):
    """(out, stats): stats [2, B, H, Tq] are each row's maximum, 0 if nothing is visible, and log sum exp(s - maximum)."""
    out, stats = _forward_fake(q, k, v, bias, sink, keep, dropout, scale, softcap, is_causal, out_dtype)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), stats.zero_()
    implementation = _forward_triton if _fits_triton(q, v, stats) else _forward_reference
    with no_autocast(q), on_device(q):
        implementation(q, k, v, bias, sink, keep, out, stats, *_options(q, dropout, scale, softcap), is_causal)
    return out, stats


def _backward(dout, q, k, v, bias, sink, keep, out, stats, dropout, scale, softcap, is_causal, *needs):
    saved = (q, k, v, bias, sink, keep, out, stats)
    grads = _backward_fake(dout, *saved, dropout, scale, softcap, is_causal, *needs)
    if out.numel() == 0 or k.shape[2] == 0:
        return tuple(g.zero_() for g in grads)
    implementation = _backward_triton if _fits_triton(q, v, stats) else _backward_reference
    with no_autocast(q), on_device(q):
        options = (*_options(q, dropout, scale, softcap), is_causal)
        implementation(dout, *saved, *options, *(g if need else None for g, need in zip(grads, needs, strict=True)))
    return grads


def _options(q, dropout, scale, softcap):
    """(factor of the probabilities kept, scale, cap)."""
    return 1 / (1 - dropout) if dropout < 1 else 0.0, q.shape[-1] ** -0.5 if scale is None else scale, softcap or 0.0


def _fits_triton(q, v, stats):
    return use_triton(q) and stats.dtype is torch.float32 and max(q.shape[-1], v.shape[-1]) <= 256


# --- reference: whole rows of some queries at a time


def _chunks(q, k, is_causal):
    """(queries, how many keys they see), by shapes alone."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    size = max(1, SCORES // (batch * heads * keys))
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        yield slice(start, stop), min(stop, keys) if is_causal else keys


def _grouped(x, k):
    """[B, H, T, X] as [B, G, H/G * T, X]: a matrix product with k or v then needs no repeated heads."""
    return x.reshape(len(k), k.shape[1], -1, x.shape[-1])


def _part(x, part, keys):
    """What of a tensor that broadcasts to [B, H, Tq, Tk] belongs to some queries and the first keys."""
    x = x[(None,) * (4 - x.dim())]
    return x[:, :, part if x.shape[2] > 1 else slice(None), :keys]


def _scores(q, k, bias, scale, softcap, is_causal, part, keys):
    """(s, tanh of the cap) of some queries, [B, H, queries, keys]."""
    queries = q[:, :, part].to(k.dtype)
    s = (_grouped(queries, k) @ k[:, :, :keys].mT).view(*queries.shape[:3], keys) * scale
    capped = torch.tanh(s / softcap) if softcap else None
    s = softcap * capped if softcap else s
    if bias is not None:
        visible = _part(bias, part, keys)
        s = s.masked_fill(~visible, -torch.inf) if bias.dtype is torch.bool else s + visible.to(s.dtype)
    if is_causal:
        row, column = (torch.arange(n, device=s.device) for n in (part.stop, keys))
        s = s.masked_fill(column > row[part].unsqueeze(1), -torch.inf)
    return s, capped


def _forward_reference(q, k, v, bias, sink, keep, out, stats, factor, scale, softcap, is_causal):
    k, v = k.to(stats.dtype), v.to(stats.dtype)
    for part, keys in _chunks(q, k, is_causal):
        s, _ = _scores(q, k, bias, scale, softcap, is_causal, part, keys)
        largest = s.amax(-1)
        if sink is not None:
            largest = largest.maximum(sink.to(s.dtype).unsqueeze(1))
        largest = largest.masked_fill(largest == -torch.inf, 0)
        p = torch.exp(s - largest.unsqueeze(-1))
        total = p.sum(-1)
        if sink is not None:
            total = total + torch.exp(sink.to(s.dtype).unsqueeze(1) - largest)
        p = p / total.unsqueeze(-1)
        if keep is not None:
            p = p * _part(keep, part, keys) * factor
        out[:, :, part] = (_grouped(p, k) @ v[:, :, :keys]).view(*p.shape[:3], -1)
        stats[:, :, :, part] = torch.stack((largest, total.log()))


def _backward_reference(
    dout, q, k, v, bias, sink, keep, out, stats, factor, scale, softcap, is_causal, *grads
):  # fmt: skip
    """Write the gradients that are not None."""
    compute = stats.dtype
    k, v = k.to(compute), v.to(compute)
    sums = [g if g is None else torch.zeros_like(g, dtype=compute) for g in grads]
    dq, dk, dv, dbias, dsink = sums
    for part, keys in _chunks(q, k, is_causal):
        s, capped = _scores(q, k, bias, scale, softcap, is_causal, part, keys)
        largest, log_sum = stats[:, :, :, part]
        p = torch.exp(s - largest.unsqueeze(-1) - log_sum.unsqueeze(-1))
        do = _grouped(dout[:, :, part].to(compute), k)
        dp = (do @ v[:, :, :keys].mT).view_as(p)
        dropped = p
        if keep is not None:
            kept = _part(keep, part, keys)
            dropped, dp = p * kept * factor, dp * kept * factor
        if dv is not None:
            dv[:, :, :keys] += _grouped(dropped, k).mT @ do
        delta = (p * dp).sum(-1)  # rather than rowsum(do * o), as o has been rounded
        ds = p * (dp - delta.unsqueeze(-1))
        if dsink is not None:
            dsink -= (torch.exp(sink.to(compute).unsqueeze(1) - largest - log_sum) * delta).sum((0, 2))
        if dbias is not None:
            total = _part(dbias, part, keys)
            total += ds.sum_to_size(total.shape)
        ds = _grouped((ds if capped is None else ds * (1 - capped.square())) * scale, k)
        if dq is not None:
            dq[:, :, part] = (ds @ k[:, :, :keys]).view(*p.shape[:3], -1)
        if dk is not None:
            dk[:, :, :keys] += ds.mT @ _grouped(q[:, :, part].to(compute), k)
    for gradient, total in zip(grads, sums, strict=True):
        if gradient is not None:
            gradient.copy_(total)


# --- Triton. ROWS queries and KEYS keys make a tile; offsets inside a tile are 32 bits wide, those of tiles 64.
#
# Scores are in units of 1 / UNIT. UNIT is log2(e), which the scale takes in, so that exp2 does; with a float bias it is
# 1, as finfo.min times log2(e) would be -inf.


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
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@jit
def _exp(x, UNIT: tl.constexpr):
    return tl.exp(x) if UNIT == 1.0 else tl.exp2(x)


@jit
def _probability(s, largest, log_sum, UNIT: tl.constexpr):
    return tl.exp((s - largest) - log_sum) if UNIT == 1.0 else tl.exp2(s - (largest + log_sum))


@jit
def _score(
    z, BIAS, at, inside, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ADD: tl.constexpr, UNIT: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """(s of z = q k^T, its derivative over SCALE). ADD: BIAS, which may be None, is added, else it shows what is visible.

    NARROW: tanh is right to 1e-7 of 1 but not of itself, a difference that is below what 16-bit operands resolve.
    """
    slope = 1.0
    if SOFTCAP != 0.0:
        if NARROW:
            t = 1 - 2 / (1 + tl.exp2(z * (2 * 1.4426950408889634 * SCALE / SOFTCAP)))
        else:
            t = tanh(z * (SCALE / SOFTCAP))
        s = t * (SOFTCAP * UNIT)
        slope = 1 - t * t
    else:
        s = z * (SCALE * UNIT)
    if BIAS is not None:
        if ADD:
            s += tl.load(BIAS + at, mask=inside, other=0.0).to(tl.float32)
        else:
            s = tl.where(tl.load(BIAS + at, mask=inside, other=1) != 0, s, float("-inf"))
    return s, slope


@jit
def _forward_kernel(
    Q, K, V, BIAS, SINK, KEEP, OUT, LARGEST, LOG_SUM, heads, group, q_count, k_count,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_q, bias_k, keep_b, keep_h, keep_q, keep_k,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, ADD: tl.constexpr,
    UNIT: tl.constexpr, NARROW: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of queries a program. BIAS, SINK and KEEP may be None."""
    k_count = k_count // 16 * 16 if EVEN else k_count
    tiles = tl.cdiv(q_count, ROWS)
    tile, head, batch = _place(tiles, heads)
    if CAUSAL:
        tile = tiles - 1 - tile  # those with the most keys start first
    first = tile * ROWS
    left = q_count - first
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    q = _load(_start(Q, batch, head, first, q_b, q_h, q_t), row, left, q_t, WIDTH, BLOCK, True)
    if BIAS is not None:
        BIAS = _start(BIAS, batch, head, first, bias_b, bias_h, bias_q)
    if KEEP is not None:
        KEEP = _start(KEEP, batch, head, first, keep_b, keep_h, keep_q)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINK is not None:
        sink = tl.load(SINK + head).to(tl.float32) * UNIT
        largest = tl.zeros([ROWS], tl.float32) + sink
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    out = tl.zeros([ROWS, V_BLOCK], tl.float32)
    full, end = k_count // KEYS * KEYS, k_count
    if CAUSAL:
        full, end = tl.minimum(full, (first + 1) // KEYS * KEYS), tl.minimum(end, first + ROWS)
    for MASKED in tl.static_range(2):  # the tiles that the causal mask and the last key leave whole, then the others
        for start in range(full if MASKED else 0, end if MASKED else full, KEYS):
            k = _load(
                _start(K, batch, head // group, start, k_b, k_h, k_t), key, k_count - start, k_t, WIDTH, BLOCK, MASKED
            )
            inside = (row < left)[:, None]
            if MASKED:
                inside = inside & (key < k_count - start)[None, :]
            at = row[:, None] * bias_q + key[None, :] * bias_k
            s, _ = _score(
                _dot(q, tl.trans(k)), BIAS if BIAS is None else _start(BIAS, 0, 0, start, 0, 0, bias_k), at, inside,
                SCALE, SOFTCAP, ADD, UNIT, NARROW,
            )  # fmt: skip
            if MASKED:
                s = tl.where((key < k_count - start)[None, :], s, float("-inf"))
                if CAUSAL:
                    s = tl.where((row + first)[:, None] >= (key + start)[None, :], s, float("-inf"))
            new = tl.maximum(largest, tl.max(s, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # while nothing is visible: no -inf - -inf
            p = _exp(s - base[:, None], UNIT)
            shrink = _exp(largest - base, UNIT)
            largest, total = new, total * shrink + tl.sum(p, 1)
            if KEEP is not None:
                at = row[:, None] * keep_q + key[None, :] * keep_k
                kept = tl.load(_start(KEEP, 0, 0, start, 0, 0, keep_k) + at, mask=inside, other=0)
                p = tl.where(kept != 0, p, 0.0)
            v = _load(
                _start(V, batch, head // group, start, v_b, v_h, v_t),
                key,
                k_count - start,
                v_t,
                V_WIDTH,
                V_BLOCK,
                MASKED,
            )
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    out *= (FACTOR / total)[:, None]
    at = tl.cast(batch * heads + head, tl.int64) * q_count + first
    _store(OUT + at * V_WIDTH, out, row, left, V_WIDTH, V_WIDTH, V_BLOCK)
    tl.store(LARGEST + at + row, tl.where(largest == float("-inf"), 0.0, largest), mask=row < left)
    tl.store(LOG_SUM + at + row, tl.log(total) * UNIT, mask=row < left)


@jit
def _query_kernel(
    DOUT, Q, K, V, BIAS, SINK, KEEP, OUT, LARGEST, LOG_SUM, DELTA, DSINK, DS, DQ, heads, group, q_count, k_count,
    o_b, o_h, o_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_q, bias_k,
    keep_b, keep_h, keep_q, keep_k, dq_b, dq_h, dq_t,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, ADD: tl.constexpr,
    UNIT: tl.constexpr, NARROW: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """delta of a tile of queries, and what is not None of: dq, ds [B, H, Tq, Tk], dsink [B, H, tiles of queries]."""
    k_count = k_count // 16 * 16 if EVEN else k_count
    tiles = tl.cdiv(q_count, ROWS)
    tile, head, batch = _place(tiles, heads)
    if CAUSAL:
        tile = tiles - 1 - tile
    first = tile * ROWS
    left = q_count - first
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    at = tl.cast(batch * heads + head, tl.int64) * q_count + first
    do = _load(_start(DOUT, batch, head, first, o_b, o_h, o_t), row, left, o_t, V_WIDTH, V_BLOCK, True)
    o = _load(OUT + at * V_WIDTH, row, left, V_WIDTH, V_WIDTH, V_BLOCK, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(DELTA + at + row, delta, mask=row < left)
    largest = tl.load(LARGEST + at + row, mask=row < left, other=0.0)
    log_sum = tl.load(LOG_SUM + at + row, mask=row < left, other=0.0)
    if DSINK is not None:
        sink = tl.load(SINK + head).to(tl.float32) * UNIT
        share = -tl.sum(_probability(sink, largest, log_sum, UNIT) * delta, 0)
        tl.store(DSINK + (batch * heads + head) * tiles + tile, share)
    if DQ is not None or DS is not None:
        do = do.to(V.dtype.element_ty)
        q = _load(_start(Q, batch, head, first, q_b, q_h, q_t), row, left, q_t, WIDTH, BLOCK, True)
        if BIAS is not None:
            BIAS = _start(BIAS, batch, head, first, bias_b, bias_h, bias_q)
        if KEEP is not None:
            KEEP = _start(KEEP, batch, head, first, keep_b, keep_h, keep_q)
        dq = tl.zeros([ROWS, BLOCK], tl.float32)
        full, end = k_count // KEYS * KEYS, k_count
        if CAUSAL:
            full, end = tl.minimum(full, (first + 1) // KEYS * KEYS), tl.minimum(end, first + ROWS)
        for MASKED in tl.static_range(2):
            for start in range(full if MASKED else 0, end if MASKED else full, KEYS):
                behind = k_count - start
                k_at = _start(K, batch, head // group, start, k_b, k_h, k_t)
                v_at = _start(V, batch, head // group, start, v_b, v_h, v_t)
                k = _load(k_at, key, behind, k_t, WIDTH, BLOCK, MASKED)
                v = _load(v_at, key, behind, v_t, V_WIDTH, V_BLOCK, MASKED)
                inside = (row < left)[:, None]
                if MASKED:
                    inside = inside & (key < behind)[None, :]
                s, slope = _score(
                    _dot(q, tl.trans(k)), BIAS if BIAS is None else _start(BIAS, 0, 0, start, 0, 0, bias_k),
                    row[:, None] * bias_q + key[None, :] * bias_k, inside, SCALE, SOFTCAP, ADD, UNIT, NARROW,
                )  # fmt: skip
                if MASKED:
                    s = tl.where((key < behind)[None, :], s, float("-inf"))
                    if CAUSAL:
                        s = tl.where((row + first)[:, None] >= (key + start)[None, :], s, float("-inf"))
                p = _probability(s, largest[:, None], log_sum[:, None], UNIT)
                dp = _dot(do, tl.trans(v))
                if KEEP is not None:
                    keep_at = row[:, None] * keep_q + key[None, :] * keep_k
                    kept = tl.load(_start(KEEP, 0, 0, start, 0, 0, keep_k) + keep_at, mask=inside, other=0)
                    dp = tl.where(kept != 0, dp * FACTOR, 0.0)
                ds = p * (dp - delta[:, None])
                if DS is not None:
                    ds_at = DS + at * k_count + start
                    tl.store(ds_at + (row[:, None] * k_count + key[None, :]), ds, mask=inside)
                if DQ is not None:
                    dq = tl.dot((ds * slope).to(k.dtype), k, dq, input_precision="ieee")
        if DQ is not None:
            _store(_start(DQ, batch, head, first, dq_b, dq_h, dq_t), dq * SCALE, row, left, dq_t, WIDTH, BLOCK)


@jit
def _key_kernel(
    DOUT, Q, K, V, BIAS, KEEP, LARGEST, LOG_SUM, DELTA, DK, DV, groups, group, q_count, k_count,
    o_b, o_h, o_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_q, bias_k,
    keep_b, keep_h, keep_q, keep_k, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, ADD: tl.constexpr,
    UNIT: tl.constexpr, NARROW: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """What is not None of dk and dv of a tile of keys. Scores are transposed, [KEYS, ROWS], as both products take them.

    Keys beyond the last need no mask: what becomes of them stays in rows that are not stored.
    """
    k_count = k_count // 16 * 16 if EVEN else k_count
    tile, kv_head, batch = _place(tl.cdiv(k_count, KEYS), groups)
    first = tile * KEYS
    behind = k_count - first
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    k = _load(_start(K, batch, kv_head, first, k_b, k_h, k_t), key, behind, k_t, WIDTH, BLOCK, True)
    v = _load(_start(V, batch, kv_head, first, v_b, v_h, v_t), key, behind, v_t, V_WIDTH, V_BLOCK, True)
    dk = tl.zeros([KEYS, BLOCK], tl.float32)
    dv = tl.zeros([KEYS, V_BLOCK], tl.float32)
    lowest = 0
    if CAUSAL:
        lowest = tl.minimum(first, q_count) // ROWS  # earlier tiles of queries see none of these keys
    tiles = tl.cdiv(q_count, ROWS) - lowest
    for step in range(group * tiles):
        head = kv_head * group + step // tiles
        start = (lowest + step % tiles) * ROWS
        left = q_count - start
        q = _load(_start(Q, batch, head, start, q_b, q_h, q_t), row, left, q_t, WIDTH, BLOCK, True)
        do = _load(_start(DOUT, batch, head, start, o_b, o_h, o_t), row, left, o_t, V_WIDTH, V_BLOCK, True)
        do = do.to(v.dtype)
        at = tl.cast(batch * groups * group + head, tl.int64) * q_count + start
        largest = tl.load(LARGEST + at + row, mask=row < left, other=0.0)
        log_sum = tl.load(LOG_SUM + at + row, mask=row < left, other=0.0)
        delta = tl.load(DELTA + at + row, mask=row < left, other=0.0)
        inside = (key < behind)[:, None] & (row < left)[None, :]
        bias = BIAS
        if BIAS is not None:
            bias = _start(BIAS, batch, head, start, bias_b, bias_h, bias_q)
            bias = _start(bias, 0, 0, first, 0, 0, bias_k)
        s, slope = _score(
            _dot(k, tl.trans(q)), bias, row[None, :] * bias_q + key[:, None] * bias_k, inside,
            SCALE, SOFTCAP, ADD, UNIT, NARROW,
        )  # fmt: skip
        if CAUSAL:
            s = tl.where((row + start)[None, :] >= (key + first)[:, None], s, float("-inf"))
        p = _probability(s, largest[None, :], log_sum[None, :], UNIT)
        dp = _dot(v, tl.trans(do))
        dropped = p
        if KEEP is not None:
            keep_at = _start(KEEP, batch, head, start, keep_b, keep_h, keep_q)
            keep_at = _start(keep_at, 0, 0, first, 0, 0, keep_k)
            keep_at += row[None, :] * keep_q + key[:, None] * keep_k
            kept = tl.load(keep_at, mask=inside, other=0) != 0
            dropped, dp = tl.where(kept, p * FACTOR, 0.0), tl.where(kept, dp * FACTOR, 0.0)
        if DV is not None:
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
        if DK is not None:
            ds = p * (dp - delta[None, :]) * slope
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    if DK is not None:
        _store(_start(DK, batch, kv_head, first, dk_b, dk_h, dk_t), dk * SCALE, key, behind, dk_t, WIDTH, BLOCK)
    if DV is not None:
        _store(_start(DV, batch, kv_head, first, dv_b, dv_h, dv_t), dv, key, behind, dv_t, V_WIDTH, V_BLOCK)


# (ROWS, KEYS, warps, stages) of the three kernels by the widest head; float32, which has no tensor cores, on its own
TILES = {
    64: ((128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    128: ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
    256: ((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
}
WIDE_TILES = ((32, 32, 4, 1),) * 3


def _in_steps(x):
    """A matrix product's operand, its last dimension contiguous and offsets inside a tile below 2^31."""
    x = x if x.stride(-1) == 1 and x.stride(2) < 1 << 23 else x.contiguous()
    return x, *x.stride()[:3]


def _written(gradient):
    """What a kernel writes as a gradient, the tensor itself if it can, and its steps."""
    if gradient is None:
        return None, 0, 0, 0
    fits = gradient.stride(-1) == 1 and gradient.stride(2) < 1 << 23
    buffer = gradient if fits else torch.empty_like(gradient, memory_format=torch.contiguous_format)
    return buffer, *buffer.stride()[:3]


def _at_scores(x, scores):
    """bias or keep with the steps by which it broadcasts to [B, H, Tq, Tk], offsets inside a tile below 2^31."""
    if x is None:
        return None, 0, 0, 0, 0
    x = x if max(x.stride()[-2:], default=0) < 1 << 22 else x.contiguous()
    return x, *x.expand(scores).stride()


def _launch_options(q, k, v, bias, keep, factor, scale, softcap, is_causal):
    width, v_width = q.shape[-1], v.shape[-1]
    block, v_block = (max(16, next_power_of_2(n)) for n in (width, v_width))
    add = bias is not None and bias.dtype is not torch.bool
    even = (bias is not None or keep is not None) and k.shape[2] % 16 == 0
    options = dict(
        FACTOR=factor, SCALE=scale, SOFTCAP=softcap, CAUSAL=is_causal, ADD=add, UNIT=1.0 if add else LOG2_E,
        NARROW=q.dtype is not torch.float32, EVEN=even, WIDTH=width, V_WIDTH=v_width, BLOCK=block, V_BLOCK=v_block,
    )  # fmt: skip
    wide = any(t.dtype is torch.float32 for t in (q, k, v))
    tiles = WIDE_TILES if wide else TILES[max(64, block, v_block)]
    return options, [dict(zip(("ROWS", "KEYS", "num_warps", "num_stages"), t, strict=True)) for t in tiles]


def _forward_triton(q, k, v, bias, sink, keep, out, stats, factor, scale, softcap, is_causal):
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    dtype, scores = torch.promote_types(q.dtype, k.dtype), (batch, heads, queries, keys)
    q, *q_steps = _in_steps(q.to(dtype))
    k, *k_steps = _in_steps(k.to(dtype))
    v, *v_steps = _in_steps(v)
    bias, *bias_steps = _at_scores(bias, scores)
    keep, *keep_steps = _at_scores(keep, scores)
    sink = sink if sink is None else sink.contiguous()
    options, (tile, _, _) = _launch_options(q, k, v, bias, keep, factor, scale, softcap, is_causal)
    _forward_kernel[(batch * heads * ceil_div(queries, tile["ROWS"]),)](
        q, k, v, bias, sink, keep, out, *stats, heads, heads // k.shape[1], queries, keys,
        *q_steps, *k_steps, *v_steps, *bias_steps, *keep_steps, **options, **tile,
    )  # fmt: skip


def _backward_triton(
    dout, q, k, v, bias, sink, keep, out, stats, factor, scale, softcap, is_causal, *grads
):  # fmt: skip
    """Write the gradients that are not None."""
    (batch, heads, queries, _), (_, groups, keys, _) = q.shape, k.shape
    dtype, scores = torch.promote_types(q.dtype, k.dtype), (batch, heads, queries, keys)
    dq, dk, dv, dbias, dsink = grads
    dout, *o_steps = _in_steps(dout)
    q, *q_steps = _in_steps(q.to(dtype))
    k, *k_steps = _in_steps(k.to(dtype))
    v, *v_steps = _in_steps(v)
    (dq_out, *dq_steps), (dk_out, *dk_steps), (dv_out, *dv_steps) = map(_written, (dq, dk, dv))
    bias, *bias_steps = _at_scores(bias, scores)
    keep, *keep_steps = _at_scores(keep, scores)
    options, (_, q_tile, k_tile) = _launch_options(q, k, v, bias, keep, factor, scale, softcap, is_causal)
    q_tiles = ceil_div(queries, q_tile["ROWS"])
    delta = torch.empty_like(stats[0])
    ds, shares = None, None
    if dbias is not None:
        whole = dbias.shape == scores and dbias.is_contiguous()
        ds = dbias if whole else q.new_empty(scores, dtype=torch.float32)
        if is_causal:
            ds.zero_()  # tiles beyond the diagonal are skipped
    if dsink is not None:
        sink = sink.contiguous()
        shares = delta.new_empty(batch, heads, q_tiles)
    sizes = (heads // groups, queries, keys, *o_steps, *q_steps, *k_steps, *v_steps, *bias_steps, *keep_steps)
    _query_kernel[(batch * heads * q_tiles,)](
        dout, q, k, v, bias, sink, keep, out, *stats, delta, shares, ds, dq_out, heads, *sizes, *dq_steps,
        **options, **q_tile,
    )  # fmt: skip
    if dk is not None or dv is not None:
        _key_kernel[(batch * groups * ceil_div(keys, k_tile["KEYS"]),)](
            dout, q, k, v, bias, keep, *stats, delta, dk_out, dv_out, groups, *sizes, *dk_steps, *dv_steps,
            **options, **k_tile,
        )  # fmt: skip
    for gradient, buffer in ((dq, dq_out), (dk, dk_out), (dv, dv_out)):
        if buffer is not gradient:
            gradient.copy_(buffer)
    if dsink is not None:
        dsink.copy_(shares.sum((0, 2)))
    if dbias is not None and not whole:
        dbias.copy_(ds.sum_to_size(dbias.shape))


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sink, Tensor? keep"
_OPTIONS = "float dropout, float? scale, float? softcap, bool is_causal"
_forward_op = register(
    f"attention_forward({_TENSORS}, {_OPTIONS}, ScalarType out_dtype) -> (Tensor, Tensor)", _forward, _forward_fake
)
_backward_op = register(
    f"attention_backward(Tensor dout, {_TENSORS}, Tensor out, Tensor stats, {_OPTIONS}, bool need_dq, bool need_dk, "
    "bool need_dv, bool need_dbias, bool need_dsink) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
