"""Attention in PyTorch: the family's reference (attention.py has its formulas), and what runs where Triton doesn't.

Whole rows of some queries at a time.
"""

import math

import torch

SCORES = 1 << 22  # how many are computed at a time


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


def _scores(q, k, bias, visible, multiplier, options, part, keys):
    """Of some queries, [B, H, queries, keys]: (s, its derivative over scale, that over the bias), 1 as None."""
    queries = q[:, :, part].to(k.dtype)
    s = (_grouped(queries, k) @ k[:, :, :keys].mT).view(*queries.shape[:3], keys) * options["scale"]
    slope = gate = None
    if softcap := options["softcap"]:
        capped = torch.tanh(s / softcap)
        s, slope = softcap * capped, 1 - capped.square()
    if multiplier is not None:
        factor = _part(multiplier, part, keys).to(s.dtype)
        s, slope = s * factor, factor if slope is None else slope * factor
    bias = 0 if bias is None else _part(bias, part, keys).to(s.dtype)
    if visible is None:
        s = s + bias
    else:
        shown = _part(visible, part, keys)
        if options["fill_first"]:
            s, slope = s.masked_fill(~shown, options["fill"]) + bias, shown if slope is None else slope * shown
        else:
            s, gate = (s + bias).masked_fill(~shown, options["fill"]), shown
    if options["floor"] != -math.inf:
        above = s >= options["floor"]
        s, gate = s.clamp_min(options["floor"]), above if gate is None else gate & above
    if options["is_causal"]:
        row, column = (torch.arange(n, device=s.device) for n in (part.stop, keys))
        s = s.masked_fill(column > row[part].unsqueeze(1), -torch.inf)
    return s, slope, gate


def _sink_of(sink, part, dtype):
    """The sink of some queries, which broadcasts to [B, H, queries]."""
    sink = sink[(None,) * (3 - sink.dim())]
    return sink[:, :, part if sink.shape[2] > 1 else slice(None)].to(dtype)


def forward(q, k, v, bias, visible, sink, keep, multiplier, out, stats, options):
    """Write out and stats."""
    k, v = k.to(stats.dtype), v.to(stats.dtype)
    for part, keys in _chunks(q, k, options["is_causal"]):
        s, _, _ = _scores(q, k, bias, visible, multiplier, options, part, keys)
        largest = s.amax(-1)
        if sink is not None:
            largest = largest.maximum(_sink_of(sink, part, s.dtype))
        largest = largest.masked_fill(largest == -torch.inf, 0)
        p = torch.exp(s - largest.unsqueeze(-1))
        total = p.sum(-1)
        if sink is not None:
            total = total + torch.exp(_sink_of(sink, part, s.dtype) - largest)
        if keep is not None:
            p = p.masked_fill(~_part(keep, part, keys), 0)
        sums = (_grouped(p, k) @ v[:, :, :keys]).view(*p.shape[:3], -1)
        out[:, :, part] = sums * (options["factor"] / total).unsqueeze(-1)
        stats[:, :, :, part] = torch.stack((largest, total.log()) if len(stats) == 2 else (largest + total.log(),))


def backward(dout, q, k, v, bias, visible, sink, keep, multiplier, out, stats, options, *grads):
    """Write the gradients of q, k, v, bias and sink that are not None."""
    compute = stats.dtype
    k, v = k.to(compute), v.to(compute)
    sums = [g if g is None else torch.zeros_like(g, dtype=compute) for g in grads]
    dq, dk, dv, dbias, dsink = sums
    for part, keys in _chunks(q, k, options["is_causal"]):
        s, slope, gate = _scores(q, k, bias, visible, multiplier, options, part, keys)
        p = s
        for summand in stats[:, :, :, part]:
            p = p - summand.unsqueeze(-1)
        p = p.exp()
        if visible is not None:  # what is filled takes no gradient, even where a query sees no key and p is NaN
            p = p.masked_fill(s == -torch.inf, 0)
        do = _grouped(dout[:, :, part].to(compute), k)
        dp = (do @ v[:, :, :keys].mT).view_as(p)
        dropped = p
        if keep is not None:
            kept = _part(keep, part, keys)
            dropped, dp = (t.masked_fill(~kept, 0) * options["factor"] for t in (p, dp))
        if dv is not None:
            dv[:, :, :keys] += _grouped(dropped, k).mT @ do
        delta = (p * dp).sum(-1)  # rather than rowsum(do * o), as o has been rounded
        ds = p * (dp - delta.unsqueeze(-1))
        ds = ds if gate is None else ds * gate
        if dsink is not None:
            share = _sink_of(sink, part, compute)
            for summand in stats[:, :, :, part]:
                share = share - summand
            total = _sink_of(dsink, part, compute)
            total -= (share.exp() * delta).sum_to_size(total.shape)
        if dbias is not None:
            total = _part(dbias, part, keys)
            total += ds.sum_to_size(total.shape)
        ds = _grouped((ds if slope is None else ds * slope) * options["scale"], k)
        if dq is not None:
            dq[:, :, part] = (ds @ k[:, :, :keys]).view(*p.shape[:3], -1)
        if dk is not None:
            dk[:, :, :keys] += ds.mT @ _grouped(q[:, :, part].to(compute), k)
    for gradient, total in zip(grads, sums, strict=True):
        if gradient is not None:
            gradient.copy_(total)
