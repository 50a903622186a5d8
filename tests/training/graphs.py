"""Small functions around the patterns' edges: function, inputs, and how many sites must be found (None: any)."""

import torch
from torch.nn import functional as F

WIDTH = 16
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def normal(*shape, dtype=FP32, grad=True, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return (scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_(grad)


def x(**options):
    return normal(2, 5, WIDTH, **options)


def w(*shape, **options):
    return normal(*(shape or (WIDTH,)), **options)


def norm(x, w, eps=1e-6):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def wide_norm(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def late_norm(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(x)


def glu(gate, up):
    return F.silu(gate) * up


def written_between(x, w):
    y = x * 2
    v = y.detach().pow(2).mean(-1, keepdim=True)
    y.mul_(2)
    return w * (y * torch.rsqrt(v + 1e-6))


def input_written_between(x, w):
    v = x.pow(2).mean(-1, keepdim=True)
    x.mul_(2)
    return w * (x * torch.rsqrt(v + 1e-6))


def view_written_between(x, w):
    y = x * 2
    v = y.detach().pow(2).mean(-1, keepdim=True)
    y.view(-1)[3:9].zero_()
    return w * (y * torch.rsqrt(v + 1e-6))


def stream_written_after(x, w, a):
    y = x * 2
    h = wide_norm(y, w)
    y += h @ a
    return y


def gate_written_after(gate, up):
    gate, up = gate * 1, up * 1
    y = F.silu(gate.detach()) * up.detach()
    gate.zero_()
    return y + gate + up


def escapes(x, w):
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (x * r), r


def used_again(x, w, v):
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (x * r) + (v * (x * r)).tanh()


def result_written(x, w):
    return norm(x, w).add_(1).mul_(2)


def result_returned_thrice(x, w):
    y = norm(x, w)
    return y, y, y.view(-1)


def whole_without_grad(x, w):
    with torch.no_grad():
        y = norm(x, w)
    return y * x


def half_without_grad(x, w):
    with torch.no_grad():
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (x * r)


def over(dims, keepdim=True):
    return lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(dims, keepdim=keepdim) + 1e-6))


def stat(make):
    return lambda x, *rest: rest[-1] * (x * torch.rsqrt(make(x, *rest[:-1]) + 1e-6))


def mean_square(x):
    return x.pow(2).mean(-1, keepdim=True)


CUBE = (WIDTH, WIDTH, WIDTH)
ONE, NONE, ANY = {"rms_norm": 1}, {}, None
GATED = {"glu": 1}

GRAPHS = {
    "norm": (norm, [x(), w()], ONE),
    "written between": (written_between, [x(), w()], NONE),
    "input written between": (input_written_between, [x(grad=False), w()], NONE),
    "view written between": (view_written_between, [x(), w()], NONE),
    "stream written after": (stream_written_after, [x(dtype=BF16), w(dtype=BF16), w(WIDTH, WIDTH, dtype=BF16)], ANY),
    "gate written after": (gate_written_after, [x(), x()], ANY),
    "intermediate escapes": (escapes, [x(), w()], NONE),
    "intermediate used again": (used_again, [x(), w(), w()], NONE),
    "result written": (result_written, [x(), w()], ANY),
    "result returned thrice": (result_returned_thrice, [x(), w()], ONE),
    "axis 0": (over(0), [normal(*CUBE), w()], NONE),
    "axis 1": (over(1), [normal(*CUBE), w()], NONE),
    "two axes": (over((-1, -2)), [normal(*CUBE), w()], NONE),
    "all axes": (over(None), [normal(*CUBE), w()], NONE),
    "last axis by its number": (over(2), [normal(*CUBE), w()], ONE),
    "dimension dropped": (over(-1, False), [normal(WIDTH, WIDTH), w()], NONE),
    "dimension dropped, one axis": (over(-1, False), [w(), w()], ANY),
    "one axis": (norm, [w(), w()], ANY),
    "of another tensor": (stat(lambda x, y: mean_square(y)), [x(), x(scale=3.0), w()], NONE),
    "product of two": (stat(lambda x, y: (x * y).abs().mean(-1, keepdim=True)), [x(), x(scale=3.0), w()], NONE),
    "other power": (stat(lambda x: x.abs().pow(2.001).mean(-1, keepdim=True)), [x(), w()], NONE),
    "sum by the width": (stat(lambda x: x.pow(2).sum(-1, keepdim=True) / WIDTH), [x(), w()], ONE),
    "sum by another number": (stat(lambda x: x.pow(2).sum(-1, keepdim=True) / (WIDTH - 1)), [x(), w()], NONE),
    "detached in the middle": (stat(lambda x: mean_square(x.detach())), [x(), w()], NONE),
    "statistic detached": (stat(lambda x: mean_square(x).detach()), [x(), w()], NONE),
    "no gradient in a half": (half_without_grad, [x(), w()], NONE),
    "no gradient": (whole_without_grad, [x(), w()], ANY),
    "epsilon a tensor": (lambda x, w, e: norm(x, w, e), [x(), w(), torch.tensor(1e-5)], NONE),
    "epsilon huge": (lambda x, w: norm(x, w, 1.0), [x(), w()], ONE),
    "epsilon zero": (lambda x, w: norm(x, w, 0.0), [x(), w()], ANY),
    "epsilon by maximum": (lambda x, w: w * (x * torch.rsqrt(mean_square(x).clamp(min=1e-6))), [x(), w()], ONE),
    "epsilon outside": (lambda x, w: w * (x / (mean_square(x).sqrt() + 1e-6)), [x(), w()], ONE),
    "divided": (lambda x, w: w * (x / (mean_square(x) + 1e-6).sqrt()), [x(), w()], ONE),
    "one plus weight": (lambda x, w: norm(x, 1 + w), [x(), w()], ONE),
    "two minus weight": (lambda x, w: norm(x, 2 - w), [x(), w()], ANY),
    "weight [1, 1, D]": (norm, [x(), w(1, 1, WIDTH)], ANY),
    "weight [5, 1]": (norm, [x(), w(5, 1)], ANY),
    "weight [5, D]": (norm, [x(), w(5, WIDTH)], ANY),
    "weight [1]": (norm, [x(), w(1)], ANY),
    "weight []": (norm, [x(), torch.tensor(1.3, requires_grad=True)], ANY),
    "weight [1, 1, 1, D]": (norm, [x(), w(1, 1, 1, WIDTH)], ANY),
    "weight is x": (lambda x: norm(x, x), [w()], ANY),
    "expanded": (lambda x, w: norm(x.expand(2, 5, WIDTH), w), [normal(1, 5, WIDTH), w()], ANY),
    "transposed": (lambda x, w: norm(x.transpose(0, 1), w), [x(), w()], ONE),
    "last transposed": (lambda x, w: norm(x.transpose(1, 2), w), [normal(2, WIDTH, 5), w()], ANY),
    "every second": (lambda x, w: norm(x[..., ::2], w), [normal(2, 5, 2 * WIDTH), w()], ANY),
    "no rows": (norm, [normal(0, WIDTH), w()], ANY),
    "no columns": (norm, [normal(2, 3, 0), w(0)], ANY),
    "one column": (lambda x, w: norm(x, w, 1.0), [normal(2, 3, 1), w(1)], ANY),
    "norm of a norm": (lambda x, w: norm(norm(x, w), w), [x(), w()], {"rms_norm": 2}),
    "two norms of one": (lambda x, w, v: norm(x, w) * norm(x, v), [x(), w(), w()], {"rms_norm": 2}),
    "x sigmoid x": (lambda g, u: g * torch.sigmoid(g) * u, [x(), x(scale=2.0)], GATED),
    "scaled sigmoid": (lambda g, u: g * torch.sigmoid(1.702 * g) * u, [x(), x()], ANY),
    "gate is up": (lambda g: F.silu(g) * g, [x()], ANY),
    "gate broadcast": (glu, [normal(2, 1, WIDTH), x()], NONE),
    "up broadcast": (glu, [x(), w()], NONE),
    "halves": (lambda x: glu(*x.chunk(2, -1)), [normal(2, 5, 2 * WIDTH)], GATED),
    "halves swapped": (lambda x: glu(*reversed(x.chunk(2, -1))), [normal(2, 5, 2 * WIDTH)], GATED),
    "halves of another axis": (lambda x: glu(*x.chunk(2, 1)), [normal(2, 6, WIDTH)], ANY),
    "overlapping parts": (lambda x: glu(x[..., :WIDTH], x[..., 8 : 8 + WIDTH]), [normal(2, 5, 2 * WIDTH)], ANY),
    "one part twice": (lambda x: glu(x[..., :WIDTH], x[..., :WIDTH]), [normal(2, 5, 2 * WIDTH)], ANY),
    "interleaved parts": (lambda x: glu(x[..., ::2], x[..., 1::2]), [normal(2, 5, 2 * WIDTH)], ANY),
    "different layouts": (lambda g, u: glu(g.transpose(1, 2), u), [x(), normal(2, WIDTH, 5)], ANY),
    "no gate": (glu, [normal(0, WIDTH), normal(0, WIDTH)], ANY),
    "single numbers": (glu, [torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)], ANY),
    "activation in place": (lambda g, u: F.silu(g * 1, inplace=True) * u, [x(), x()], ANY),
    "activation in float": (lambda g, u: F.silu(g.float()).to(g.dtype) * u, [x(dtype=BF16), x(dtype=BF16)], ANY),
    "mixed gate and up": (glu, [x(dtype=BF16), x()], ANY),
    **{
        f"{f.__name__} {str(a)[6:]} {str(b)[6:]}": (f, [x(dtype=a), w(dtype=b)], ANY)
        for f in (norm, wide_norm, late_norm)
        for a in (FP32, BF16, FP16, FP64)
        for b in (FP32, BF16, FP16, FP64)
    },
}  # fmt: skip
