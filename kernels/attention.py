"""Attention beyond scaled_dot_product_attention: capped scores, sinks, a bias of any kind, dropout drawn elsewhere.

    s = multiplier * softcap(scale * q k^T) + bias,  softcap(z) = c tanh(z / c)
    p = exp(s - lse),  lse = log(sum over keys exp(s) + exp(sink))      a sink takes its share but has no value
    o = (p * kept) v,  kept = keep / (1 - dropout)

Forward keeps one tile of scores at a time: a running maximum and sum, by which what was added up so far is corrected
(online softmax; Milakov and Gimelshein, 2018), as FlashAttention-2 has it (Dao, 2023). Backward computes p anew from
lse. With dp = (do v^T) * kept and delta = rowsum(do * o), which is rowsum(p * dp),

    ds = p * (dp - delta)      dz = scale * multiplier * ds * (1 - (softcap(z) / c)^2)
    dbias = ds, summed where it was broadcast
    dq = dz k      dk = dz^T q      dv = (p * kept)^T do      dsink = -sum over queries exp(sink - lse) * delta

One kernel runs over the keys of a tile of queries, for dq and dbias, another over the queries of all heads that share a
tile of keys, for dk and dv: no atomics, bit-equal on repeat. With a float bias the maximum and the logarithm of the sum
are kept apart: finfo.min, by which models hide keys, makes a hidden row's maximum so large that their sum would be it.
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
    q, k, v, *, bias=None, sink=None, keep=None, multiplier=None, dropout=0.0, scale=None, softcap=None,
    is_causal=False, out_dtype=None,
):  # fmt: skip
    """softmax(multiplier * softcap(scale * q k^T) + bias) v in float32 (float64 if a tensor is), no scores in memory.

    q: [B, H, Tq, D], k: [B, G, Tk, D], v: [B, G, Tk, Dv], H a multiple of G: query head h reads head h // (H // G) of k
    and v. Any strides; one of 1 in the last dimension avoids a copy. scale: default D**-0.5. softcap: None or 0: none.
    bias: broadcasts to [B, H, Tq, Tk], never expanded; floats are added, booleans are True where a key is visible.
    multiplier: floats that broadcast to [B, H, Tq, Tk] and take no gradient. is_causal: query i sees keys 0 to i,
    whatever Tq and Tk are. sink: [H], or broadcasts to [B, H, Tq]: one more score of each head or query.
    keep: bool [B, H, Tq, Tk], what dropout leaves of the probabilities, which are multiplied by 1 / (1 - dropout).
    Returns [B, H, Tq, Dv], contiguous, in out_dtype, default the promoted dtype of q, k and v. A query that sees no key
    is NaN, as softmax has it, and so is every gradient that it reaches; with a sink it is 0.
    Triton rounds probabilities to v.dtype before they multiply v; float64, heads above 256 and float32 heads above 128
    take the reference. Gradients: q, k, v, sink and a float bias, in the dtype of each. Saves the tensors given, the
    result and one number a row of it, two with a float bias. Only a bias's gradient takes memory for all scores.
    Raises ValueError for shapes that don't fit, a bias of integers, and dropout without keep or outside [0, 1].
    """
    _check(q, k, v, bias, sink, keep, multiplier, dropout)
    sink = sink.unsqueeze(-1) if sink is not None and sink.dim() == 1 else sink
    out_dtype = out_dtype or torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    scale, softcap = None if scale is None else float(scale), float(softcap) if softcap else None
    return _Attention.apply(q, k, v, bias, sink, keep, multiplier, float(dropout), scale, softcap, is_causal, out_dtype)


def _check(q, k, v, bias, sink, keep, multiplier, dropout):
    if any(t.dim() != 4 for t in (q, k, v)):
        raise ValueError(f"q, k and v must have 4 dimensions, not {q.dim()}, {k.dim()} and {v.dim()}")
    (batch, heads, queries, width), (_, groups, keys, _) = q.shape, k.shape
    if k.shape != (batch, groups, keys, width) or v.shape[:3] != k.shape[:3]:
        shapes = [list(t.shape) for t in (q, k, v)]
        raise ValueError(f"q, k and v must be [B, H, Tq, D], [B, G, Tk, D] and [B, G, Tk, Dv], not {shapes}")
    if groups == 0 or heads % groups:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, not {heads} of {groups}")
    scores = (batch, heads, queries, keys)
    if bias is not None and not (bias.dtype is torch.bool or bias.dtype.is_floating_point):
        raise ValueError(f"bias must be of floats or booleans, not {bias.dtype}")
    if multiplier is not None and (not multiplier.dtype.is_floating_point or multiplier.requires_grad):
        raise ValueError("multiplier must be of floats that require no gradient")
    for name, given, whole in (("bias", bias, scores), ("multiplier", multiplier, scores), ("sink", sink, scores[:3])):
        if given is None or (name == "sink" and given.shape == (heads,)):
            continue
        fits = given.dim() <= len(whole) and all(
            n in (1, m) for n, m in zip(given.shape[::-1], whole[::-1], strict=False)
        )
        if not fits or (name == "sink" and given.dim() == 1):
            raise ValueError(f"{name} must broadcast to {list(whole)}, its shape is {list(given.shape)}")
    if keep is not None and (keep.shape != scores or keep.dtype is not torch.bool):
        raise ValueError(f"keep must be booleans of shape {list(scores)}, not {keep.dtype} of {list(keep.shape)}")
    if not 0 <= dropout <= 1 or (dropout and keep is None):
        raise ValueError(f"dropout must be in [0, 1], and 0 without keep, not {dropout}")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, sink, keep, multiplier, dropout, scale, softcap, is_causal, out_dtype):
        ctx.options = (dropout, scale, softcap, is_causal)
        out, stats = _forward_op(q, k, v, bias, sink, keep, multiplier, *ctx.options, out_dtype)
        ctx.save_for_backward(q, k, v, bias, sink, keep, multiplier, out, stats)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        needs = ctx.needs_input_grad[:5]
        grads = _backward_op(dout, *ctx.saved_tensors, *ctx.options, *needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 7


def _forward_fake(q, k, v, bias, sink, keep, multiplier, dropout, scale, softcap, is_causal, out_dtype):
    """(out, stats): lse [1, B, H, Tq]; with a float bias [2, B, H, Tq], the maximum (0 for -inf) and lse - maximum."""
    out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=out_dtype)
    return out, q.new_empty(1 + _adds(bias), *q.shape[:3], dtype=compute_dtype(q, k, v, bias, sink))


def _adds(bias):
    return bias is not None and bias.dtype is not torch.bool


def _backward_fake(
    dout, q, k, v, bias, sink, keep, multiplier, out, stats, dropout, scale, softcap, is_causal, *needs
):  # fmt: skip
    return tuple(
        torch.empty_like(t) if need else q.new_empty(0) for t, need in zip((q, k, v, bias, sink), needs, strict=True)
    )


def _forward(q, k, v, bias, sink, keep, multiplier, dropout, scale, softcap, is_causal, out_dtype):
    tensors = (q, k, v, bias, sink, keep, multiplier)
    out, stats = _forward_fake(*tensors, dropout, scale, softcap, is_causal, out_dtype)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), stats.zero_()
    implementation = _forward_triton if _fits_triton(q, k, v, stats) else _forward_reference
    with no_autocast(q), on_device(q):
        implementation(*tensors, out, stats, *_options(q, dropout, scale, softcap), is_causal)
    return out, stats


def _backward(dout, q, k, v, bias, sink, keep, multiplier, out, stats, dropout, scale, softcap, is_causal, *needs):
    saved = (q, k, v, bias, sink, keep, multiplier, out, stats)
    grads = _backward_fake(dout, *saved, dropout, scale, softcap, is_causal, *needs)
    if out.numel() == 0 or k.shape[2] == 0:
        return tuple(g.zero_() for g in grads)
    implementation = _backward_triton if _fits_triton(q, k, v, stats) else _backward_reference
    with no_autocast(q), on_device(q):
        options = (*_options(q, dropout, scale, softcap), is_causal)
        implementation(dout, *saved, *options, *(g if need else None for g, need in zip(grads, needs, strict=True)))
    return grads


def _options(q, dropout, scale, softcap):
    """(factor of the probabilities kept, scale, cap)."""
    return 1 / (1 - dropout) if dropout < 1 else 0.0, q.shape[-1] ** -0.5 if scale is None else scale, softcap or 0.0


def _fits_triton(q, k, v, stats):
    dtypes = (q.dtype, k.dtype, v.dtype)
    widest = 128 if torch.float32 in dtypes else 256
    broken = INTERPRET and torch.bfloat16 in dtypes  # Triton's interpreter multiplies the bits of bfloat16 as integers
    return use_triton(q) and stats.dtype is torch.float32 and max(q.shape[-1], v.shape[-1]) <= widest and not broken


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


def _scores(q, k, bias, multiplier, scale, softcap, is_causal, part, keys):
    """(s, its derivative over scale, 1 as None) of some queries, [B, H, queries, keys]."""
    queries = q[:, :, part].to(k.dtype)
    s = (_grouped(queries, k) @ k[:, :, :keys].mT).view(*queries.shape[:3], keys) * scale
    slope = None
    if softcap:
        capped = torch.tanh(s / softcap)
        s, slope = softcap * capped, 1 - capped.square()
    if multiplier is not None:
        factor = _part(multiplier, part, keys).to(s.dtype)
        s, slope = s * factor, factor if slope is None else slope * factor
    if bias is not None:
        visible = _part(bias, part, keys)
        s = s.masked_fill(~visible, -torch.inf) if bias.dtype is torch.bool else s + visible.to(s.dtype)
    if is_causal:
        row, column = (torch.arange(n, device=s.device) for n in (part.stop, keys))
        s = s.masked_fill(column > row[part].unsqueeze(1), -torch.inf)
    return s, slope


def _sink_of(sink, part, dtype):
    """The sink of some queries, which broadcasts to [B, H, queries]."""
    sink = sink[(None,) * (3 - sink.dim())]
    return sink[:, :, part if sink.shape[2] > 1 else slice(None)].to(dtype)


def _forward_reference(q, k, v, bias, sink, keep, multiplier, out, stats, factor, scale, softcap, is_causal):
    k, v = k.to(stats.dtype), v.to(stats.dtype)
    for part, keys in _chunks(q, k, is_causal):
        s, _ = _scores(q, k, bias, multiplier, scale, softcap, is_causal, part, keys)
        largest = s.amax(-1)
        if sink is not None:
            largest = largest.maximum(_sink_of(sink, part, s.dtype))
        largest = largest.masked_fill(largest == -torch.inf, 0)
        p = torch.exp(s - largest.unsqueeze(-1))
        total = p.sum(-1)
        if sink is not None:
            total = total + torch.exp(_sink_of(sink, part, s.dtype) - largest)
        p = p / total.unsqueeze(-1)
        if keep is not None:
            p = p * _part(keep, part, keys) * factor
        out[:, :, part] = (_grouped(p, k) @ v[:, :, :keys]).view(*p.shape[:3], -1)
        stats[:, :, :, part] = torch.stack((largest, total.log()) if len(stats) == 2 else (largest + total.log(),))


def _backward_reference(
    dout, q, k, v, bias, sink, keep, multiplier, out, stats, factor, scale, softcap, is_causal, *grads
):  # fmt: skip
    """Write the gradients that are not None."""
    compute = stats.dtype
    k, v = k.to(compute), v.to(compute)
    sums = [g if g is None else torch.zeros_like(g, dtype=compute) for g in grads]
    dq, dk, dv, dbias, dsink = sums
    for part, keys in _chunks(q, k, is_causal):
        s, slope = _scores(q, k, bias, multiplier, scale, softcap, is_causal, part, keys)
        p = s
        for summand in stats[:, :, :, part]:
            p = p - summand.unsqueeze(-1)
        p = p.exp()
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
            share = _sink_of(sink, part, compute)
            for summand in stats[:, :, :, part]:
                share = share - summand
            total = _sink_of(dsink, part, compute)
            total -= (share.exp() * delta).sum_to_size(total.shape)
        if dbias is not None:
            total = _part(dbias, part, keys)
            total += ds.sum_to_size(total.shape)
        ds = _grouped((ds if slope is None else ds * slope) * scale, k)
        if dq is not None:
            dq[:, :, part] = (ds @ k[:, :, :keys]).view(*p.shape[:3], -1)
        if dk is not None:
            dk[:, :, :keys] += ds.mT @ _grouped(q[:, :, part].to(compute), k)
    for gradient, total in zip(grads, sums, strict=True):
        if gradient is not None:
            gradient.copy_(total)


# --- Triton. A tile is ROWS queries and KEYS keys; offsets inside of it are 32 bits wide, those to its start 64.
#
# Scores and lse are in units of 1 / UNIT. UNIT is log2(e), which the scale takes in, so that exp2 does; with a float
# bias it is 1, as finfo.min times log2(e) would be -inf.


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
    """A tile of bias or keep; i and j are queries and keys counted from the tile's first, shaped to be broadcast."""
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
def _probability(s, lse, log_sum, UNIT: tl.constexpr):
    """exp(s - lse), or where UNIT is 1, and lse the maximum, exp(s - maximum - log_sum)."""
    return tl.exp((s - lse) - log_sum) if UNIT == 1.0 else tl.exp2(s - lse)


@jit
def _score(
    z, BIAS, MULTIPLIER, batch, head, first_i, first_j, i, j, inside,
    bias_b, bias_h, bias_q, bias_k, times_b, times_h, times_q, times_k,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ADD: tl.constexpr, UNIT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """(s of z = q k^T, its derivative over SCALE). BIAS, MULTIPLIER may be None; ADD: BIAS is added, else shows keys.

    NARROW: tanh is right to 1e-7 of 1, not of itself; operands of 16 bits don't resolve the difference.
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
    if MULTIPLIER is not None:
        factor = _load_scores(
            MULTIPLIER, batch, head, first_i, first_j, i, j, inside, 0.0, times_b, times_h, times_q, times_k
        ).to(tl.float32)  # fmt: skip
        s, slope = s * factor, slope * factor
    if BIAS is not None:
        bias = _load_scores(BIAS, batch, head, first_i, first_j, i, j, inside, 1, bias_b, bias_h, bias_q, bias_k)
        s = s + bias.to(tl.float32) if ADD else tl.where(bias != 0, s, float("-inf"))
    return s, slope


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
    Q, K, V, BIAS, SINK, KEEP, MULTIPLIER, OUT, LSE, LOG_SUM, heads, group, q_count, k_count,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_q, bias_k, keep_b, keep_h, keep_q, keep_k,
    times_b, times_h, times_q, times_k, sink_b, sink_h, sink_q,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, ADD: tl.constexpr,
    UNIT: tl.constexpr, NARROW: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of queries. BIAS, SINK, KEEP, MULTIPLIER may be None. EVEN: k_count is a multiple of 16: wider loads."""
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
            s, _ = _score(
                _dot(q, tl.trans(k)), BIAS, MULTIPLIER, batch, head, first, start, i, j, inside,
                bias_b, bias_h, bias_q, bias_k, times_b, times_h, times_q, times_k, SCALE, SOFTCAP, ADD, UNIT, NARROW,
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
    if ADD:
        tl.store(LOG_SUM + at + row, log_sum, mask=row < left)
    else:
        lse += log_sum
    tl.store(LSE + at + row, lse, mask=row < left)


@jit
def _query_kernel(
    DOUT, Q, K, V, BIAS, SINK, KEEP, MULTIPLIER, OUT, LSE, LOG_SUM, DELTA, DSINK, DS, DQ,
    heads, group, q_count, k_count,
    o_b, o_h, o_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_q, bias_k,
    keep_b, keep_h, keep_q, keep_k, times_b, times_h, times_q, times_k, dq_b, dq_h, dq_t, sink_b, sink_h, sink_q,
    PASSES: tl.constexpr, FACTOR: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
    ADD: tl.constexpr, UNIT: tl.constexpr, NARROW: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr, BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
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
    tl.store(DELTA + at + row, delta, mask=row < left)
    lse = tl.load(LSE + at + row, mask=row < left, other=0.0)
    log_sum = tl.load(LOG_SUM + at + row, mask=row < left, other=0.0) if ADD else lse
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
                    s, slope = _score(
                        _dot(q, tl.trans(k)), BIAS, MULTIPLIER, batch, head, first, start, i, j, inside,
                        bias_b, bias_h, bias_q, bias_k, times_b, times_h, times_q, times_k,
                        SCALE, SOFTCAP, ADD, UNIT, NARROW,
                    )  # fmt: skip
                    if EDGE:
                        s = _hide(s, i + first, j + start, k_count, CAUSAL)
                    dp = _dot(do, tl.trans(v))
                    if KEEP is not None:
                        kept = _load_scores(
                            KEEP, batch, head, first, start, i, j, inside, 0, keep_b, keep_h, keep_q, keep_k
                        )  # fmt: skip
                        dp = tl.where(kept != 0, dp * FACTOR, 0.0)
                    p = _probability(s, lse[:, None], log_sum[:, None], UNIT)
                    if PASS == 0 and (DS is not None or DSINK is not None):
                        exact += tl.sum(p * dp, 1)
                    if PASS == PASSES - 1:
                        if DS is not None:
                            ds = p * (dp - exact[:, None])
                            tl.store(DS + (at * k_count + start) + (i * k_count + j), ds, mask=inside)
                        if DQ is not None:
                            ds = p * (dp - delta[:, None])
                            dq = tl.dot((ds * slope).to(k.dtype), k, dq, input_precision="ieee")
        if DQ is not None:
            _store(_start(DQ, batch, head, first, dq_b, dq_h, dq_t), dq * SCALE, row, left, dq_t, WIDTH, BLOCK)
        if DSINK is not None:
            sink = _load_sink(SINK, batch, head, first, row, left, sink_b, sink_h, sink_q) * UNIT
            tl.store(DSINK + at + row, -_probability(sink, lse, log_sum, UNIT) * exact, mask=row < left)


@jit
def _key_kernel(
    DOUT, Q, K, V, BIAS, KEEP, MULTIPLIER, LSE, LOG_SUM, DELTA, DK, DV, groups, group, q_count, k_count,
    o_b, o_h, o_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, bias_b, bias_h, bias_q, bias_k,
    keep_b, keep_h, keep_q, keep_k, times_b, times_h, times_q, times_k, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    FACTOR: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, ADD: tl.constexpr,
    UNIT: tl.constexpr, NARROW: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
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
        log_sum = tl.load(LOG_SUM + at + row, mask=row < left, other=0.0) if ADD else lse
        delta = tl.load(DELTA + at + row, mask=row < left, other=0.0)
        s, slope = _score(
            _dot(k, tl.trans(q)), BIAS, MULTIPLIER, batch, head, start, first, i, j, inside,
            bias_b, bias_h, bias_q, bias_k, times_b, times_h, times_q, times_k, SCALE, SOFTCAP, ADD, UNIT, NARROW,
        )  # fmt: skip
        if CAUSAL:
            s = tl.where(j + first <= i + start, s, float("-inf"))
        p = _probability(s, lse[None, :], log_sum[None, :], UNIT)
        dp = _dot(v, tl.trans(do))
        dropped = p
        if KEEP is not None:
            kept = _load_scores(KEEP, batch, head, start, first, i, j, inside, 0, keep_b, keep_h, keep_q, keep_k) != 0
            dropped, dp = tl.where(kept, p * FACTOR, 0.0), tl.where(kept, dp * FACTOR, 0.0)
        if DV is not None:
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
        if DK is not None:
            dk = tl.dot((p * (dp - delta[None, :]) * slope).to(q.dtype), q, dk, input_precision="ieee")
    if DK is not None:
        _store(_start(DK, batch, kv_head, first, dk_b, dk_h, dk_t), dk * SCALE, key, behind, dk_t, WIDTH, BLOCK)
    if DV is not None:
        _store(_start(DV, batch, kv_head, first, dv_b, dv_h, dv_t), dv, key, behind, dv_t, V_WIDTH, V_BLOCK)


# (ROWS, KEYS, warps, stages) of the forward, query and key kernels by the widest head, first without tensors over all
# scores, then with one. A warp takes 16 rows of a product. TILES fits in 99 KiB; float32 has no tensor cores.
TILES = {
    64: (((128, 64, 8, 2), (128, 32, 8, 2), (32, 128, 8, 2)), ((128, 64, 8, 2), (128, 32, 8, 2), (16, 64, 4, 2))),
    128: (((128, 32, 8, 2), (64, 32, 4, 2), (32, 64, 4, 1)), ((128, 32, 8, 2), (64, 32, 4, 2), (16, 64, 4, 2))),
    256: (((64, 16, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),) * 2,
}
TILES_OF_WARPGROUPS = {
    64: (((128, 64, 8, 3), (128, 32, 8, 2), (32, 128, 8, 2)),) * 2,
    128: (((128, 64, 8, 3), (128, 32, 8, 2), (32, 128, 8, 2)), ((128, 32, 8, 2), (128, 32, 8, 2), (16, 64, 4, 2))),
    256: (((128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 8, 2)),) * 2,
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


def _launch_options(q, k, v, bias, keep, multiplier, factor, scale, softcap, is_causal):
    """(what the three kernels are all given, tiles of each)."""
    width, v_width = q.shape[-1], v.shape[-1]
    block, v_block = (max(16, next_power_of_2(n)) for n in (width, v_width))
    add, over_scores = _adds(bias), any(t is not None for t in (bias, keep, multiplier))
    options = dict(
        FACTOR=factor, SCALE=scale, SOFTCAP=softcap, CAUSAL=is_causal, ADD=add, UNIT=1.0 if add else LOG2_E,
        NARROW=q.dtype is not torch.float32, EVEN=over_scores and k.shape[2] % 16 == 0,
        WIDTH=width, V_WIDTH=v_width, BLOCK=block, V_BLOCK=v_block,
    )  # fmt: skip
    table = TILES_OF_WARPGROUPS if has_warpgroups(q) else TILES
    table = TILES_OF_FLOAT32 if torch.float32 in (q.dtype, k.dtype, v.dtype) else table
    names = ("ROWS", "KEYS", "num_warps", "num_stages")
    tiles = table[max(64, block, v_block)][over_scores]
    return options, [dict(zip(names, tile, strict=True)) for tile in tiles]


def _forward_triton(q, k, v, bias, sink, keep, multiplier, out, stats, factor, scale, softcap, is_causal):
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    dtype, scores = torch.promote_types(q.dtype, k.dtype), (batch, heads, queries, keys)
    (q, *q_steps), (k, *k_steps), (v, *v_steps) = _operand(q.to(dtype)), _operand(k.to(dtype)), _operand(v)
    (bias, *bias_steps), (keep, *keep_steps) = _over_scores(bias, scores), _over_scores(keep, scores)
    (multiplier, *steps), (sink, *sink_steps) = _over_scores(multiplier, scores), _over_scores(sink, scores[:3])
    options, (tile, _, _) = _launch_options(q, k, v, bias, keep, multiplier, factor, scale, softcap, is_causal)
    _forward_kernel[(batch * heads * ceil_div(queries, tile["ROWS"]),)](
        q, k, v, bias, sink, keep, multiplier, out, *(*stats, None)[:2], heads, heads // k.shape[1], queries, keys,
        *q_steps, *k_steps, *v_steps, *bias_steps, *keep_steps, *steps, *sink_steps, **options, **tile,
    )  # fmt: skip


def _backward_triton(
    dout, q, k, v, bias, sink, keep, multiplier, out, stats, factor, scale, softcap, is_causal, *grads
):  # fmt: skip
    """Write the gradients that are not None."""
    (batch, heads, queries, _), (_, groups, keys, _) = q.shape, k.shape
    dtype, scores = torch.promote_types(q.dtype, k.dtype), (batch, heads, queries, keys)
    *matrix_grads, dbias, dsink = grads
    (q, *q_steps), (k, *k_steps), (v, *v_steps) = _operand(q.to(dtype)), _operand(k.to(dtype)), _operand(v)
    (bias, *bias_steps), (keep, *keep_steps) = _over_scores(bias, scores), _over_scores(keep, scores)
    (multiplier, *steps), (sink, *sink_steps) = _over_scores(multiplier, scores), _over_scores(sink, scores[:3])
    (dq, *dq_steps), (dk, *dk_steps), (dv, *dv_steps) = map(_result, matrix_grads)
    dout, *o_steps = _operand(dout)
    options, (_, q_tile, k_tile) = _launch_options(
        q, k, v, bias, keep, multiplier, factor, scale, softcap, is_causal
    )  # fmt: skip
    if dbias is not None or dsink is not None:  # what these take besides would not fit in registers
        if options["NARROW"]:
            q_tile["KEYS"] //= 2
        elif max(options["BLOCK"], options["V_BLOCK"]) > 64:
            q_tile["num_warps"] *= 2
    q_tiles, k_tiles = ceil_div(queries, q_tile["ROWS"]), ceil_div(keys, k_tile["KEYS"])
    delta = torch.empty_like(stats[0])
    ds, shares = None, None
    if dbias is not None:
        ds = dbias if dbias.shape == scores and dbias.is_contiguous() else delta.new_empty(scores)
        if is_causal:
            ds.zero_()  # tiles beyond the diagonal are skipped
    if dsink is not None:
        shares = torch.empty_like(delta)
    stats = (*stats, None)[:2]
    shared = (heads // groups, queries, keys, *o_steps, *q_steps, *k_steps, *v_steps, *bias_steps, *keep_steps, *steps)
    _query_kernel[(batch * heads * q_tiles,)](
        dout, q, k, v, bias, sink, keep, multiplier, out, *stats, delta, shares, ds, dq, heads, *shared, *dq_steps,
        *sink_steps, PASSES=1 + (ds is not None), **options, **q_tile,
    )  # fmt: skip
    if dk is not None or dv is not None:
        _key_kernel[(batch * groups * k_tiles,)](
            dout, q, k, v, bias, keep, multiplier, *stats, delta, dk, dv, groups, *shared, *dk_steps, *dv_steps,
            **options, **k_tile,
        )  # fmt: skip
    for gradient, buffer in zip(matrix_grads, (dq, dk, dv), strict=True):
        if buffer is not gradient:
            gradient.copy_(buffer)
    if dsink is not None:
        dsink.copy_(shares.sum_to_size(dsink.shape))
    if dbias is not None and ds is not dbias:
        dbias.copy_(ds.sum_to_size(dbias.shape))


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sink, Tensor? keep, Tensor? multiplier"
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
