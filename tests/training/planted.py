"""Patterns with planted faults; each takes the place of a built-in pattern."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rewriter import Call
from rewriter.patterns.glu import GLU
from rewriter.patterns.rms_norm import RMSNorm
from rewriter.patterns.rotary import Rotary


def replaced(call, base=RMSNorm, **members):
    """The built-in pattern with its replacement wrapped as `call(original, *tensors, **options)`; members overwrite."""

    def replacement(self, *matches):
        given = base.replacement(self, *matches)
        return Call(lambda *args, **options: call(given.fn, *args, **options), given.args, given.kwargs)

    return type("Planted", (base,), {"replacement": replacement, **members})()


def unchanged(**members):
    return replaced(lambda f, *args, **options: f(*args, **options), **members)


def boom(*args, **options):
    raise KeyError("planted")


def eager_norm(x, weight, eps):
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, spoil):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.spoil = eps, spoil
        return eager_norm(x, weight, eps)

    @staticmethod
    def backward(ctx, upstream):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            gradients = torch.autograd.grad(eager_norm(*leaves, ctx.eps), leaves, upstream)
        return (*ctx.spoil(*gradients), None, None)


def backward(spoil):
    return replaced(lambda f, x, weight, eps, **_: WrongBackward.apply(x, weight, eps, spoil))


def result(change):
    """The replacement's result changed, for real and for fake tensors."""
    return replaced(lambda f, *args, **options: change(f(*args, **options)))


def real_result(change):
    """Changed for real tensors only: the shape function of the planted operator lies."""
    return replaced(
        lambda f, x, *rest, **o: (lambda y: y if isinstance(x, FakeTensor) else change(y))(f(x, *rest, **o))
    )


def writes(position):
    def call(f, *args, **options):
        y = f(*args, **options)
        with torch.no_grad():
            args[position].mul_(1.5)
        return y

    return call


def wrong(f, *args, **options):
    return 1.5 * f(*args, **options)


def draws(f, *args, **options):
    torch.rand(3)
    return f(*args, **options)


def first_node(match):
    return next(iter(match.output.graph.nodes))


# What must be refused for its numbers or its kind: no site of the pattern may be left.
WRONG = {
    "constant": result(lambda y: y * 1.0001),
    "small constant": result(lambda y: y * 1.00002),
    "epsilon": replaced(lambda f, x, w, eps, **o: f(x, w, eps=10 * eps, **o)),
    "offset": replaced(lambda f, x, w, offset, **o: f(x, w, offset=offset + 0.001, **o)),
    "backward of x": backward(lambda x, w: (1.01 * x, w)),
    "backward of weight": backward(lambda x, w: (x, 1.01 * w)),
    "sign of a gradient": backward(lambda x, w: (x, -w)),
    "gradient missing": backward(lambda x, w: (x, None)),
    "gradient of x missing": backward(lambda x, w: (None, w)),
    "gradient NaN": backward(lambda x, w: (x, w * float("nan"))),
    "gradient of another shape": backward(lambda x, w: (x.sum(), w)),
    "backward raises": backward(boom),
    "detached": result(lambda y: y.detach()),
    "NaN": result(lambda y: y * float("nan")),
    "one NaN": result(lambda y: y.index_fill(-1, torch.tensor([0]), float("nan"))),
    "infinite": result(lambda y: y / 0),
    "shape": result(lambda y: y[..., :-1]),
    "rank": result(lambda y: y[None]),
    "dtype": result(lambda y: y.double()),
    "stride": result(lambda y: y.transpose(0, 1).contiguous().transpose(0, 1)),
    "two results": result(lambda y: (y, y)),
    "no result": result(lambda y: None),
    "text": result(lambda y: "y"),
    "real shape": real_result(lambda y: y[..., :-1]),
    "real dtype": real_result(lambda y: y.double()),
    "real stride": real_result(lambda y: y.transpose(0, 1).contiguous().transpose(0, 1)),
    "call raises": replaced(boom),
    "call raises for real": real_result(boom),
    "check raises": unchanged(check=boom),
    "check gives a number": unchanged(check=lambda self, match: 5),
    "replacement raises": unchanged(replacement=boom),
    "replacement gives nothing": unchanged(replacement=lambda self, *matches: None),
    "replacement of itself": unchanged(replacement=lambda self, match: Call(torch.neg, (match.output,))),
    "replacement of another": unchanged(replacement=lambda self, match: Call(torch.neg, (first_node(match),))),
    "replacement of nothing": unchanged(replacement=lambda self, match: Call(torch.zeros, (match.meta("x").shape,))),
    "sample raises": unchanged(sample=boom),
    "sample of another shape": unchanged(sample=lambda self, match, name, shapes, generator: torch.zeros(1)),
    "sample hides it": replaced(wrong, sample=lambda self, match, name, shapes, generator: torch.zeros(shapes[name])),
    "writes its input": replaced(writes(0)),
    "writes its weight": replaced(writes(1)),
    "draws random numbers": replaced(draws),
    "wrong rotary": replaced(wrong, base=Rotary, group=lambda self, matches: [(m,) for m in matches]),
    "rotary writes its angles": replaced(writes(-2), base=Rotary),
    "glu swapped": replaced(lambda f, gate, up, **o: f(up, gate, **o), base=GLU),
}  # fmt: skip

# What must not do harm; the pattern may still be applied.
HARMLESS = {
    "group raises": unchanged(group=boom),
    "group gives a number": unchanged(group=lambda self, matches: 7),
    "group gives numbers": unchanged(group=lambda self, matches: [(1, 2)]),
    "group gives nothing": unchanged(group=lambda self, matches: []),
    "group repeats": unchanged(group=lambda self, matches: [(m,) for m in (*matches, *matches)]),
    "sample draws": unchanged(sample=lambda self, match, name, shapes, generator: torch.randn(shapes[name])),
    "only one of two is wrong": replaced(
        lambda f, *a, **o: (r[0], 1.01 * r[1]) if isinstance(r := f(*a, **o), tuple) else r, base=Rotary
    ),
}
