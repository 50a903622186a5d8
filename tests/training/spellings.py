"""Ways in which people write the same computation: name -> (pattern, function, inputs). Each has to be found."""

import math

import torch
from torch.nn import functional as F

B, T, HEADS, GROUPS, D, CLASSES = 2, 7, 4, 2, 16, 50
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR)


def x():
    return normal(B, T, D)


def w():
    return normal(D)


def q():
    return normal(B, HEADS, T, D)


def kv():
    return normal(B, GROUPS, T, D)


LABELS = torch.randint(0, CLASSES, (B, T), generator=GENERATOR)
IGNORING = LABELS.masked_fill(torch.rand(B, T, generator=GENERATOR) < 0.3, -100)
VISIBLE = torch.ones(T, T).tril().bool()
BIAS = torch.zeros(T, T).masked_fill(~VISIBLE, float("-inf"))
TEMPERATURE = torch.tensor(1.7)
ANGLES = torch.outer(torch.arange(T).float(), 10000 ** (-torch.arange(0, D, 2) / D))
C, S = ANGLES.cos(), ANGLES.sin()
COS, SIN = torch.cat((C, C), -1), torch.cat((S, S), -1)
TURNS = torch.polar(torch.ones_like(ANGLES), ANGLES)


def square_mean(x):
    return x.pow(2).mean(-1, keepdim=True)


def rms(x, w):
    return x / torch.sqrt(square_mean(x) + 1e-6) * w


NORMS = {
    "over the root": (rms, [x(), w()]),
    "power": (lambda x, w: w * x * (square_mean(x) + 1e-6) ** -0.5, [x(), w()]),
    "normalize": (lambda x, w: F.normalize(x, dim=-1) * D**0.5 * w, [x(), w()]),
    "normalize, shifted": (lambda x, w: F.normalize(x, dim=-1) * (w + 1) * D**0.5, [x(), w()]),
    "norm": (lambda x: x / x.norm(dim=-1, keepdim=True), [x()]),
    "norm, clamped": (lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5), [x()]),
    "norm over root of width": (lambda x, w: w * (x / (x.norm(dim=-1, keepdim=True) / D**0.5)), [x(), w()]),
    "sum": (lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6), [x()]),
    "sum over width": (lambda x, w: w * x / torch.sqrt((x * x).sum(-1, keepdim=True) / D + 1e-6), [x(), w()]),
    "dropped and unsqueezed": (lambda x, w: x * torch.rsqrt((x**2).mean(-1) + 1e-6)[..., None] * w, [x(), w()]),
    "einsum": (
        lambda x, w: x * torch.rsqrt((torch.einsum("btd,btd->bt", x, x) / D).unsqueeze(-1) + 1e-6) * w,
        [x(), w()],
    ),
    "eps outside the root": (lambda x, w: w * x / (square_mean(x).sqrt() + 1e-3), [x(), w()]),
    "norm and eps outside": (lambda x, w: x / (x.norm(2, dim=-1, keepdim=True) * D**-0.5 + 1e-3) * w, [x(), w()]),
    "factor scaled": (lambda x: x * (4.0 / x.norm(p=2, dim=-1, keepdim=True).clamp_min(1e-5)), [x()]),
    "one gain": (lambda x, w: x * torch.rsqrt(square_mean(x) + 1e-6) * w, [x(), torch.tensor(1.3)]),
    "in place": (lambda x, w: (x * 1).mul_(torch.rsqrt(square_mean(x) + 1e-6)).mul_(w), [x(), w()]),
    "library": (lambda x, w: F.rms_norm(x, (D,), w, 1e-5), [x(), w()]),
}


def centre(x):
    return x - x.mean(-1, keepdim=True)


def biased(x, **options):
    return x.var(-1, keepdim=True, **options)


def by_var_mean(x, w, b):
    variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return torch.addcmul(b, (x - mean) * torch.rsqrt(variance + 1e-5), w)


LAYER_NORMS = {
    "library": (lambda x, w, b: F.layer_norm(x, (D,), w, b), [x(), w(), w()]),
    "var": (lambda x, w, b: centre(x) / torch.sqrt(biased(x, unbiased=False) + 1e-5) * w + b, [x(), w(), w()]),
    "centred square": (lambda x, w, b: b + w * (centre(x) * (square_mean(centre(x)) + 1e-5).rsqrt()), [x(), w(), w()]),
    "var_mean": (by_var_mean, [x(), w(), w()]),
    "shifted": (lambda x, w, b: centre(x) / (biased(x, correction=0) + 1e-5) ** 0.5 * (1 + w) + b, [x(), w(), w()]),
    "deviation": (lambda x, w, b: w * centre(x) / (x.std(-1, keepdim=True) + 1e-3) + b, [x(), w(), w()]),
    "biased deviation": (
        lambda x, w, b: centre(x) / (x.std(-1, keepdim=True, unbiased=False) + 1e-3) * w + b,
        [x(), w(), w()],
    ),
    "unbiased": (lambda x, w, b: centre(x) / torch.sqrt(biased(x) + 1e-3) * w + b, [x(), w(), w()]),
    "no weight": (lambda x: centre(x) * torch.rsqrt(biased(x, correction=0) + 1e-5), [x()]),
}


def added(norm):
    def both(x, y, *weights):
        s = x + y
        return s, norm(s, *weights)

    return both


def half(x):
    return x * COS + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * SIN


def half_by_chunks(x):
    a, b = x.chunk(2, -1)
    return x * COS + torch.cat((-b, a), -1) * SIN


def other_way_round(x):
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([a * C + b * S, a * (-S) + b * C], -1)


def as_complex(x):
    return torch.view_as_real(torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * TURNS).flatten(-2)


def halves_as_complex(x):
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * TURNS
    return torch.cat((z.real, z.imag), -1)


def unbound_pairs(x):
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((a * C - b * S, a * S + b * C), dim=-1).reshape(x.shape)


def unbound_halves(x):
    a, b = x.view(*x.shape[:-1], 2, D // 2).unbind(-2)
    return torch.stack([a * C - b * S, b * C + a * S], -2).flatten(-2)


def every_two(x):
    cos, sin = C.repeat_interleave(2, -1), S.repeat_interleave(2, -1)
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


def pairs_to_halves(x):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat([a * C - b * S, b * C + a * S], -1)


def part_of_it(x):
    turned, rest = x[..., :8], x[..., 8:]
    other = torch.cat((-turned[..., 4:], turned[..., :4]), -1)
    return torch.cat((turned * COS[:, :8] + other * SIN[:, :8], rest), -1)


def out_of_a_table(x):
    pairs, table = x.reshape(*x.shape[:-1], -1, 2), torch.stack((C, S), -1)
    a = pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1]
    b = pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1]
    return torch.stack([a, b], -1).flatten(-2)


def angles_anew(x):
    a, b = x.chunk(2, -1)
    return torch.cat([a * ANGLES.cos() - b * ANGLES.sin(), b * ANGLES.cos() + a * ANGLES.sin()], -1)


def viewed_as(x):
    cos, sin = C.repeat_interleave(2, -1), S.repeat_interleave(2, -1)
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).view_as(x) * sin


def chunks_as_complex(x):
    z = torch.view_as_complex(torch.stack(torch.chunk(x.float(), 2, -1), -1)) * TURNS
    return torch.cat(torch.chunk(torch.view_as_real(z), 2, -1), -2).reshape(x.shape)


def columns_joined(x):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat(((a * C - b * S)[..., None], (b * C + a * S)[..., None]), -1).flatten(-2)


ROTARIES = {
    "out of one table": out_of_a_table,
    "angles computed at each use": angles_anew,
    "pairs, viewed": viewed_as,
    "complex chunks": chunks_as_complex,
    "columns joined": columns_joined,
    "scaled": lambda x: x * COS * 1.3 + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * SIN * 1.3,
    "half": half,
    "half, by chunks": half_by_chunks,
    "half, the other way round": other_way_round,
    "complex": as_complex,
    "complex halves": halves_as_complex,
    "pairs, unbound": unbound_pairs,
    "halves, unbound": unbound_halves,
    "pairs": every_two,
    "pairs to halves": pairs_to_halves,
    "part": part_of_it,
    "roll": lambda x: x * COS + torch.roll(x, D // 2, -1) * torch.cat((-S, S), -1),
    "addcmul": lambda x: torch.addcmul(x * COS, torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1), SIN),
}


def repeated(k):
    return k[:, :, None].expand(B, GROUPS, HEADS // GROUPS, T, D).reshape(B, HEADS, T, D)


def attend(masked, scale=D**-0.5):
    def attention(q, k, v):
        scores = masked(q @ repeated(k).transpose(-1, -2) * scale)
        weights = F.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return (weights @ repeated(v)).transpose(1, 2).reshape(B, T, -1)

    return attention, [q(), kv(), kv()]


def by_hand(q, k, v):
    scores = q @ k.mT / math.sqrt(D) + BIAS
    exponentials = (scores - scores.max(-1, keepdim=True)[0]).exp()
    return (exponentials / exponentials.sum(-1, keepdim=True)) @ v


def by_einsum(q, k, v):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(~VISIBLE, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def by_baddbmm(q, k, v):
    scores = torch.baddbmm(BIAS.expand(len(q), T, T), q, k.transpose(1, 2), alpha=0.25)
    return torch.bmm(torch.softmax(scores, -1), v)


def with_sink(first):
    def attention(q, k, v, sink):
        scores, column = q @ k.mT / 4 + BIAS, sink.view(1, -1, 1, 1).expand(B, HEADS, T, 1)
        if first:
            return torch.cat((column, scores), -1).softmax(-1)[..., 1:] @ v
        joined = torch.cat((scores, column), -1)
        return (joined - joined.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v

    return attention, [q(), q(), q(), normal(HEADS)]


def sink_behind(q, k, v, sink):
    scores = q @ k.mT / 4 + BIAS
    share = (scores.logsumexp(-1) - sink[:, None]).sigmoid()
    return scores.softmax(-1) @ v * share.unsqueeze(-1)


def sink_of_each_query(q, k, v, sink):
    return torch.cat((q @ k.mT / 4 + BIAS, sink[..., None]), -1).softmax(-1)[..., :-1] @ v


def by_bmm(q, k, v):
    scores = torch.bmm(q, k.mT).view(B, HEADS, T, T) + BIAS
    return torch.bmm(scores.view(B * HEADS, T, T).softmax(-1), v)


def zeroed(scores_of, zero):
    """Probabilities that are set to 0, of queries that see no key too."""

    def attention(q, k, v):
        return zero(scores_of(q @ k.mT / 4).softmax(-1)) @ v

    return attention, [q(), q(), q()]


def one_head_for_all(q, k, v):
    scores = torch.einsum("bhid,bjd->bhij", q, k) / 4 + BIAS
    return torch.einsum("bhij,bjd->bhid", scores.softmax(-1), v)


def groups_by_einsum(q, k, v):
    scores = torch.einsum("btgrd,bsgd->bgrts", q, k) / 4 + BIAS
    return torch.einsum("bgrts,bsgd->btgrd", scores.softmax(-1), v)


def groups_apart(q, k, v):
    q = q.view(B, GROUPS, HEADS // GROUPS, T, D)
    scores = (q @ k[:, :, None].mT / 4).masked_fill(~VISIBLE, -torch.inf)
    return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)


def one_mask_for_two(q, k, v):
    hidden = ~torch.ones(T, T).tril().bool()
    first, second = ((a @ k.mT / 4).masked_fill(hidden, -torch.inf).softmax(-1) for a in (q, 2 * q))
    return first @ v + second @ v


EARLIER = torch.ones(T, T).tril(-1).bool()  # of which the first query sees none
LOWEST = torch.finfo(torch.float32).min
COLUMN = normal(B, HEADS, 1, T)
UNSEEN = torch.zeros(T, T).masked_fill(~EARLIER, -torch.inf)

ATTENTIONS = {
    "nothing visible, filled": attend(lambda s: s.masked_fill(~EARLIER, -1e9)),
    "nothing visible, added": attend(lambda s: s + torch.zeros(T, T).masked_fill(~EARLIER, LOWEST)),
    "fill, then bias": attend(lambda s: torch.where(EARLIER, s, LOWEST) + BIAS.masked_fill(~VISIBLE, 1.0)),
    "bias, then fill": attend(lambda s: (s + BIAS.masked_fill(~VISIBLE, 1.0)).masked_fill(~EARLIER, LOWEST)),
    "bias, fill, bias": attend(lambda s: (s + COLUMN).masked_fill(~EARLIER, -5.0) * 0.5 + COLUMN),
    "fill that leaves something": attend(lambda s: s.masked_fill(~VISIBLE, -3.0)),
    "fills by two numbers": attend(lambda s: s.masked_fill(~VISIBLE, -torch.inf).masked_fill(~EARLIER, -1e9)),
    "fills by two other numbers": attend(lambda s: s.masked_fill(~EARLIER, -1e9).masked_fill(~VISIBLE, -torch.inf)),
    "raised": attend(lambda s: torch.max(s + BIAS + COLUMN * 1e38, torch.tensor(LOWEST))),
    "raised, nothing visible": attend(lambda s: (s + UNSEEN).clamp(min=LOWEST)),
    "raised far": attend(lambda s: s.clamp_min(-0.25)),
    "zeroed": zeroed(lambda s: s.masked_fill(~EARLIER, -torch.inf), lambda p: p.masked_fill(~EARLIER, 0.0)),
    "zeroed elsewhere": zeroed(lambda s: s + BIAS, lambda p: torch.where(EARLIER, 0.0, p)),
    "zeroed twice": zeroed(lambda s: s, lambda p: torch.where(EARLIER, p, 0.0).masked_fill(COLUMN > 0, 0.0)),
    "small fill": attend(lambda s: s.masked_fill(~VISIBLE, -1e4)),
    "multiplied": attend(lambda s: s * VISIBLE.float() - 1e4 * (1 - VISIBLE.float())),
    "subtracted": attend(lambda s: s - 1e10 * (1 - VISIBLE.float())),
    "two fills": attend(lambda s: s.masked_fill(~VISIBLE, -1e9).masked_fill(torch.zeros(B, 1, 1, T).bool(), -1e9)),
    "without the maximum": attend(lambda s: s + BIAS - (s + BIAS).amax(-1, keepdim=True).detach()),
    "capped": attend(lambda s: 20 * torch.tanh(s / 20) + BIAS),
    "capped and scaled in one": attend(lambda s: 20 * torch.tanh(s * (0.25 / 20)), 1.0),
    "sink": with_sink(first=False),
    "sink first": with_sink(first=True),
    "sink behind": (sink_behind, [q(), q(), q(), normal(HEADS)]),
    "sink of each query": (sink_of_each_query, [q(), q(), q(), normal(B, HEADS, T)]),
    "bmm": (by_bmm, [normal(B * HEADS, T, D) for _ in range(3)]),
    "one head of keys": (one_head_for_all, [q(), x(), x()]),
    "groups by einsum": (
        groups_by_einsum,
        [normal(B, T, GROUPS, 2, D), normal(B, T, GROUPS, D), normal(B, T, GROUPS, D)],
    ),
    "groups apart": (groups_apart, [q(), kv(), kv()]),
    "one mask for two": (one_mask_for_two, [q(), q(), q()]),
    "no mask": attend(lambda s: s),
    "bias": attend(lambda s: s + BIAS),
    "where": attend(lambda s: torch.where(VISIBLE, s, torch.finfo(s.dtype).min)),
    "masked_fill": attend(lambda s: s.masked_fill(~VISIBLE, -1e9)),
    "in place": attend(lambda s: s.masked_fill_(~VISIBLE, -torch.inf)),
    "tril": attend(lambda s: s.masked_fill(torch.tril(torch.ones(T, T)) == 0, -torch.inf)),
    "triu": attend(lambda s: s + torch.triu(torch.full((T, T), -torch.inf), 1)),
    "arange": attend(lambda s: s.masked_fill(torch.arange(T)[:, None] < torch.arange(T), -torch.inf)),
    "scaled after the mask": attend(lambda s: (s + BIAS) / 2, 1.0),
    "divided by a tensor": attend(lambda s: s / TEMPERATURE + BIAS, 1.0),
    "scaled by a tensor after the mask": attend(lambda s: (s + BIAS) / TEMPERATURE, 1.0),
    "scaled by head": attend(lambda s: s * (torch.arange(HEADS) + 1).view(HEADS, 1, 1), 1.0),
    "two masks": attend(lambda s: (s + BIAS / 2).masked_fill(~VISIBLE, -torch.inf)),
    "einsum": (by_einsum, [normal(B, T, HEADS, D) for _ in range(3)]),
    "baddbmm": (by_baddbmm, [normal(B * HEADS, T, D) for _ in range(3)]),
    "one head": (lambda q, k, v: torch.softmax(q @ k.T * 0.25 + BIAS, -1) @ v, [normal(T, D) for _ in range(3)]),
    "softmax by hand": (by_hand, [q(), q(), q()]),
    "library": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q(), q(), q()]),
    "library, repeated": (
        lambda q, k, v: F.scaled_dot_product_attention(q, repeated(k), v.repeat_interleave(2, 1), is_causal=True),
        [q(), kv(), kv()],
    ),
}
CAUSAL = ["tril", "triu", "arange"]


def clamped(x):
    gate, up = x[..., ::2].clamp(max=7), x[..., 1::2].clamp(-7, 7)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def unbound(x):
    gate, up = x.view(B, T, 2, D // 2).unbind(2)
    return F.silu(gate) * up


def last_of_two(x):
    both = x.view(B, T, D // 2, 2)
    return F.silu(both[..., 0]) * both[..., 1]


GLUS = {
    "library": (lambda x: F.glu(x, -1), [x()]),
    "clamped": (clamped, [x()]),
    "unbound": (unbound, [x()]),
    "last of two": (last_of_two, [x()]),
    "exponential": (lambda x, y: x / (1 + torch.exp(-x)) * y, [x(), x()]),
    "sigmoid": (lambda x, y: y * (x * torch.sigmoid(x)), [x(), x()]),
    "quick gelu": (lambda x, y: x * torch.sigmoid(1.702 * x) * y, [x(), x()]),
    "gelu by tanh": (
        lambda x, y: y * (0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))),
        [x(), x()],
    ),
    "gelu by tanh, factored": (
        lambda x, y: y * (x * 0.5 * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))),
        [x(), x()],
    ),
    "gelu by erf": (lambda x, y: (x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))) * y, [x(), x()]),
    "squared relu": (lambda x, y: F.relu(x) ** 2 * y, [x(), x()]),
}


def head(loss, shape=(CLASSES, D)):
    def tail(x, w):
        return loss(x @ w.T if shape[0] == CLASSES else x @ w)

    return tail, [x(), normal(*shape)]


def by_logsumexp(z):
    return (torch.logsumexp(z, -1) - z.gather(-1, LABELS[..., None]).squeeze(-1)).mean()


def by_gather(z):
    chosen = F.log_softmax(z, -1).gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
    return -(chosen * (IGNORING != -100)).sum() / 5


def by_rows(z):
    return -torch.log_softmax(z.view(-1, CLASSES), -1)[torch.arange(B * T), LABELS.view(-1)].mean()


def target_of(z):
    return z.gather(-1, LABELS[..., None])


def smoothed(z):
    logs = F.log_softmax(z, -1)
    return -(0.9 * target_of(logs).squeeze(-1) + 0.1 * logs.mean(-1)).mean()


def smoothed_losses(z):
    logs = F.log_softmax(z, -1)
    return (0.9 * -target_of(logs) + 0.1 * -logs.mean(-1, keepdim=True)).mean()


def tempered(temperature):
    return lambda x, w, t: flat(temperature(x @ w.T, t)), [x(), normal(CLASSES, D), torch.tensor(0.7)]


def capped(z):
    return 30 * torch.tanh(z.float() / 30)


def flat(z, target=IGNORING, **options):
    return F.cross_entropy(z.reshape(-1, CLASSES), target.reshape(-1), **options)


HEADS_AND_LOSSES = {
    "flat": head(flat),
    "classes second": head(lambda z: F.cross_entropy(z.transpose(1, 2), IGNORING)),
    "classes second, by token": head(lambda z: F.cross_entropy(z.permute(0, 2, 1), IGNORING, reduction="none").mean()),
    "shifted": head(lambda z: flat(z[:, :-1].float(), IGNORING[:, 1:])),
    "sum over items": head(lambda z: flat(z, reduction="sum") / 7),
    "nll": head(lambda z: F.nll_loss(F.log_softmax(z, -1).view(-1, CLASSES), IGNORING.view(-1))),
    "nll of rows": head(lambda z: F.nll_loss(F.log_softmax(z.view(-1, CLASSES), 1), IGNORING.view(-1))),
    "nll of a logarithm": head(
        lambda z: F.nll_loss(torch.log(torch.softmax(z, -1)).view(-1, CLASSES), IGNORING.view(-1))
    ),
    "gather": head(by_gather),
    "logsumexp": head(by_logsumexp),
    "index": head(by_rows),
    "class weights": head(lambda z: flat(z, weight=torch.arange(CLASSES) / CLASSES + 0.5, label_smoothing=0.1)),
    "softcap": head(lambda z: flat(capped(z))),
    "one-hot": head(lambda z: -(F.one_hot(LABELS, CLASSES) * F.log_softmax(z, -1)).sum(-1).mean()),
    "one-hot floats": head(lambda z: (-F.log_softmax(z, -1) * F.one_hot(LABELS, CLASSES).float()).sum(-1).mean()),
    "negative first": head(lambda z: target_of(-F.log_softmax(z, -1)).mean()),
    "negative difference": head(lambda z: -(target_of(z).squeeze(-1) - z.logsumexp(-1)).mean()),
    "logsumexp, kept": head(lambda z: (z.logsumexp(-1, keepdim=True) - target_of(z)).mean()),
    "take_along_dim": head(lambda z: -F.log_softmax(z, -1).take_along_dim(LABELS[..., None], -1).mean()),
    "smoothed by hand": head(smoothed),
    "smoothed losses": head(smoothed_losses),
    "temperature": tempered(lambda z, t: z / t),
    "learned scale": tempered(lambda z, t: z * t.exp()),
    "scale": head(lambda z: flat(z / 3)),
    "other layout": head(flat, (D, CLASSES)),
    "einsum": (lambda x, w: flat(torch.einsum("btd,vd->btv", x, w)), [x(), normal(CLASSES, D)]),
    "added bias": (lambda x, w, b: flat(x @ w.T + b), [x(), normal(CLASSES, D), normal(CLASSES)]),
}

SPELLINGS = {
    **{f"rms_norm: {n}": ("rms_norm", *case) for n, case in NORMS.items()},
    **{f"layer_norm: {n}": ("layer_norm", *case) for n, case in LAYER_NORMS.items()},
    "add_rms_norm": ("add_rms_norm", added(rms), [x(), x(), w()]),
    "add_layer_norm": ("add_layer_norm", added(by_var_mean), [x(), x(), w(), w()]),
    **{f"rotary: {n}": ("rotary", fn, [q()]) for n, fn in ROTARIES.items()},
    **{f"attention: {n}": ("attention", *case) for n, case in ATTENTIONS.items()},
    **{f"glu: {n}": ("glu", *case) for n, case in GLUS.items()},
    **{f"linear_cross_entropy: {n}": ("linear_cross_entropy", *case) for n, case in HEADS_AND_LOSSES.items()},
    "cross_entropy": ("cross_entropy", flat, [normal(B, T, CLASSES)]),
}
