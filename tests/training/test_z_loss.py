"""A z-loss written in a model is part of the fused loss if it is over the rows that count, and otherwise is left."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training.common import relative

import rewriter

V, D = 23, 16


def loss_of(z, t, **options):
    return F.cross_entropy(z.view(-1, V), t.view(-1), **options)


def squares(z):
    return z.logsumexp(-1).square()


def counts(t):
    return t != -100


def masked(z, t):
    return 1e-2 * (squares(z) * counts(t)).sum() / counts(t).sum()


def capped(z, t):
    z = torch.tanh(z / 5) * 5
    return loss_of(z, t) + masked(z, t)


def shifted(z, t):
    z, t = z[:, :-1].contiguous(), t[:, 1:].contiguous()
    return loss_of(z, t) + masked(z, t)


def floats(z, t):
    flat, kept = z.view(-1, V).float(), counts(t).view(-1)
    square = torch.logsumexp(flat, dim=-1).pow(2)
    return loss_of(z.float(), t, label_smoothing=0.1) + 1e-2 * (square * kept.float()).sum() / kept.float().sum()


def by_token(z, t):
    lse = z.logsumexp(-1)
    losses = lse - z.gather(-1, t.clamp(min=0)[..., None]).squeeze(-1)
    return ((losses + 1e-2 * lse.square()) * counts(t)).sum() / 7


def by_row(z, t, mask):
    losses = F.cross_entropy(z.view(-1, V), t.view(-1), reduction="none")
    square = squares(z.view(-1, V))
    return (losses + 1e-2 * (square * counts(t.view(-1)) if mask else square)).mean()


def of_other_rows(z, t):
    cut, labels = z[:, :-1].contiguous(), t[:, 1:].contiguous()
    return loss_of(cut, labels) + 1e-2 * (squares(cut) * counts(t[:, :-1])).sum() / counts(t[:, :-1]).sum()


FUSED = {
    "product with the mask": lambda z, t: loss_of(z, t) + masked(z, t),
    "count of at least 1": lambda z, t: (
        loss_of(z, t) + 1e-2 * ((squares(z) * counts(t).float()).sum() / counts(t).sum().clamp(min=1))
    ),
    "selection": lambda z, t: 1e-2 * torch.where(counts(t), squares(z), 0).sum() / counts(t).sum() + loss_of(z, t),
    "filled": lambda z, t: loss_of(z, t) + squares(z).masked_fill(t == -100, 0.0).sum() / counts(t).sum() / 100,
    "filled by the opposite": lambda z, t: (
        loss_of(z, t) + 0.01 * squares(z).masked_fill(~counts(t), 0.0).sum() / (~(t == -100)).sum()
    ),
    "sum": lambda z, t: (loss_of(z, t, reduction="sum") + (1e-2 * squares(z) * counts(t)).sum()) / 7,
    "class weights": lambda z, t: loss_of(z, t, weight=torch.linspace(0.5, 2, V)) + masked(z, t),
    "floats": floats,
    "shifted": shifted,
    "capped": capped,
    "by row": lambda z, t: by_row(z, t, mask=True),
    "by token": by_token,
}
OTHERS = {
    "all rows": lambda z, t: loss_of(z, t) + 1e-2 * squares(z).mean(),
    "all rows, summed": lambda z, t: loss_of(z, t, reduction="sum") + 1e-2 * squares(z).sum(),
    "by row, of all": lambda z, t: by_row(z, t, mask=False),
    "over the number of all rows": lambda z, t: loss_of(z, t) + 1e-2 * (squares(z) * counts(t)).mean(),
    "rows shifted in the loss only": lambda z, t: loss_of(z[:, :-1].contiguous(), t[:, 1:].contiguous()) + masked(z, t),
    "mask of other rows": of_other_rows,
    "ignored rows": lambda z, t: loss_of(z, t) + 1e-2 * (squares(z) * (t == -100)).sum() / (t == -100).sum(),
    "ignored rows, selected": lambda z, t: (
        loss_of(z, t) + 1e-2 * torch.where(counts(t), 0, squares(z)).sum() / counts(t).sum()
    ),
    "another count": lambda z, t: loss_of(z, t) + 1e-2 * (squares(z) * counts(t)).sum() / (t != 3).sum(),
    "another class ignored": lambda z, t: loss_of(z, t) + 1e-2 * (squares(z) * (t != 3)).sum() / (t != 3).sum(),
    "sum with a mean": lambda z, t: loss_of(z, t) + 1e-2 * (squares(z) * counts(t)).sum(),
    "mean with a sum": lambda z, t: loss_of(z, t, reduction="sum") + masked(z, t),
    "not squared": lambda z, t: loss_of(z, t) + 1e-2 * (z.logsumexp(-1) * counts(t)).sum() / counts(t).sum(),
    "of other logits": lambda z, t: loss_of(z * 2, t) + masked(z, t),
    "learned factor": lambda z, t: loss_of(z, t) + masked(z, t) * z.mean().detach(),
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.body, self.head, self.function = nn.Linear(D, D), nn.Linear(D, V, bias=False), function

    def forward(self, x, t):
        return self.function(self.head(self.body(x)), t)


def trained(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Model({**FUSED, **OTHERS}[name])
    model = rewriter.optimize(copy.deepcopy(eager))
    for tokens in (9, 12):
        x, t = torch.randn(2, tokens, D), torch.randint(0, V, (2, tokens))
        t[0, 1:4] = -100
        results = []
        for m in (model, eager):
            loss = m(x, t)
            results.append([loss, *torch.autograd.grad(loss, list(m.parameters()))])
        assert all(relative(a, b) < 1e-5 for a, b in zip(*results, strict=True))
    return rewriter.report(model)


@pytest.mark.parametrize("name", FUSED)
def test_fused(name):
    report = trained(name)
    assert report.coverage() == {"linear_cross_entropy": (1, 1)}, str(report)
    assert all(abs(r.details["z_loss"] - 0.01) < 1e-9 for r in report.rewrites)


@pytest.mark.parametrize("name", OTHERS)
def test_left(name):
    report = trained(name)
    assert report.rewrites and not any("z_loss" in r.details for r in report.rewrites), str(report)


def test_why_the_head_is_left():
    reasons = [m.reason for m in trained("all rows").near_misses if m.pattern == "linear_cross_entropy"]
    assert reasons == ["its intermediate result linear_1 is used again by logsumexp"]
