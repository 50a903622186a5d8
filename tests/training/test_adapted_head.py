"""Hand-written heads with low-rank adapters, fused with every loss: the float64 rule for the loss and all gradients."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training.common import assert_trains_alike, near_truth

import rewriter

B, T, D, V, R = 2, 9, 8, 50, 3
IDS = torch.arange(B * T).view(B, T) * 7 % V
LABELS = (IDS * 3 + 1).remainder(V).masked_fill(IDS % 5 == 0, -100)
STEPS = [(IDS, LABELS), (IDS.flip(1)[:, 1:].contiguous(), LABELS[:, 1:].contiguous())]

# How the adapter is added. w: weight, b: bias or None, d and u: its matrices, s: a number, p: a dropout.
SPELLINGS = {
    "result": lambda x, w, b, d, u, s, p: F.linear(x, w, b) + F.linear(F.linear(p(x), d), u) * s,
    "scale first": lambda x, w, b, d, u, s, p: F.linear(x, w, b) + s * F.linear(F.linear(p(x), d), u),
    "scale between": lambda x, w, b, d, u, s, p: F.linear(F.linear(p(x), d) * s, u) + F.linear(x, w, b),
    "input scaled": lambda x, w, b, d, u, s, p: F.linear(x, w, b) + F.linear(F.linear(p(x) * s, d), u),
    "divided": lambda x, w, b, d, u, s, p: F.linear(x, w, b) + F.linear(F.linear(p(x), d), u) / s,
    "no scale": lambda x, w, b, d, u, s, p: F.linear(x, w, b) + F.linear(F.linear(p(x), d), u),
    "products": lambda x, w, b, d, u, s, p: F.linear(x, w, b) + p(x) @ d.t() @ u.t() * s,
    "multiplied out": lambda x, w, b, d, u, s, p: F.linear(x, w, b) + F.linear(p(x), u @ d) * s,
    "merged": lambda x, w, b, d, u, s, p: F.linear(x, w + s * (u @ d), b),
    "twice": lambda x, w, b, d, u, s, p: (
        F.linear(x, w, b) + F.linear(F.linear(x, d), u) * s + F.linear(F.linear(x, d.flip(0)), u) * (s + 1)
    ),
    "wide": lambda x, w, b, d, u, s, p: (F.linear(x, w, b) + F.linear(F.linear(p(x).to(d.dtype), d), u) * s).to(
        w.dtype
    ),
    "wide, kept": lambda x, w, b, d, u, s, p: F.linear(x, w, b) + F.linear(F.linear(p(x).to(d.dtype), d), u) * s,
}
LOSSES = {
    "shifted": lambda z, t: F.cross_entropy(z[:, :-1].flatten(0, 1), t[:, 1:].flatten()),
    "floats": lambda z, t: F.cross_entropy(z.float().view(-1, V), t.view(-1), label_smoothing=0.1),
    "sum": lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1), reduction="sum") / (t != -100).sum(),
    "each": lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1), reduction="none").square().mean(),
    "capped": lambda z, t: F.cross_entropy(2 * torch.tanh(0.5 * z / 2).view(-1, V), t.view(-1)),
    "weighted": lambda z, t: F.cross_entropy(z.view(-1, V), t.view(-1), torch.linspace(0.1, 2, V).to(z)),
    "z-loss": lambda z, t: with_z_loss(z.view(-1, V).float(), t.view(-1)),
    "gathered": lambda z, t: -F.log_softmax(z, -1).gather(-1, t.clamp(0)[..., None]).mean(),
    "by hand": lambda z, t: (z.logsumexp(-1) - z.gather(-1, t.clamp(0)[..., None]).squeeze(-1)).mean(),
    "smoothed by hand": lambda z, t: smoothed(z.float(), t.clamp(0)[..., None]),
}


def with_z_loss(z, t):
    keep = t != -100
    return F.cross_entropy(z, t) + 1e-2 * (z.logsumexp(-1).square() * keep).sum() / keep.sum()


def smoothed(z, t):
    logs = F.log_softmax(z, -1)
    return -(0.9 * logs.gather(-1, t) + 0.1 * logs.mean(-1, keepdim=True)).mean()


class Model(nn.Module):
    def __init__(self, spelling="result", loss="shifted", bias=False, trained=False, dropout=0.0, logits=False):
        super().__init__()
        self.embed, self.body = nn.Embedding(V, D), nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.head, self.drop = nn.Linear(D, V, bias), nn.Dropout(dropout)
        self.down, self.up = nn.Linear(D, R, False), nn.Linear(R, V, False)
        self.spelling, self.loss, self.logits = SPELLINGS[spelling], LOSSES[loss], logits
        self.head.requires_grad_(trained)

    def forward(self, ids, labels):
        h = self.body(self.embed(ids))
        z = self.spelling(h, self.head.weight, self.head.bias, self.down.weight, self.up.weight, 1.7, self.drop)
        loss = self.loss(z, labels)
        return (z, loss) if self.logits else loss


def model(dtype=torch.float32, adapter=None, **options):
    torch.manual_seed(0)
    made = Model(**options).to(dtype)
    for layer in (made.down, made.up) if adapter is not None else ():
        layer.to(adapter)
    return made


def fused(report, rank=R):
    assert not report.near_misses and not report.sites("cross_entropy")
    (found,) = [r for r in report.rewrites if r.pattern == "linear_cross_entropy"]
    assert found.details["rank"] == rank, found.details
    return found


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if "wide" not in s])
def test_spellings(spelling, trained):
    made = model(spelling=spelling, bias=trained, trained=trained, logits=True)
    *_, report = assert_trains_alike(made, [(IDS, LABELS)])
    fused(report, rank=2 * R if spelling == "twice" else R)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_losses(loss, dropout):
    *_, report = assert_trains_alike(model(loss=loss, dropout=dropout, bias=True), STEPS)
    fused(report)


PRECISIONS = {
    "bfloat16": (torch.bfloat16, None, False),
    "float32 beside bfloat16": (torch.bfloat16, torch.float32, False),
    "autocast": (torch.float32, None, True),
    "autocast of bfloat16": (torch.bfloat16, torch.float32, True),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("loss, trained", [("shifted", True), ("floats", False), ("capped", False), ("each", True)])
def test_precision(loss, trained, precision):
    dtype, adapter, autocast = PRECISIONS[precision]
    made = model(dtype, adapter, spelling="wide" if adapter else "result", loss=loss, trained=trained, bias=trained)
    context = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
    fused(rewriter.report(near_truth(made, [(IDS, LABELS)], context, 8e-3)))


def test_a_sum_that_stays_wide():
    made = model(torch.bfloat16, torch.float32, spelling="wide, kept", loss="shifted")
    context = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=False)
    near_truth(made, [(IDS, LABELS)], context, 8e-3)


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("loss", ["shifted", "each", "sum"])
def test_nothing_counts(loss, divide):
    """Every row ignored: a mean of none is no number, and no gradient is either."""
    made = model(loss=loss, trained=True)
    optimised = rewriter.optimize(made)
    for p in made.parameters():
        p.grad = None
    loss = optimised(IDS, torch.full_like(LABELS, -100))
    loss.backward()
    assert loss.isnan() or loss == 0
    assert all(p.grad.eq(0).all() for p in made.parameters() if p.requires_grad)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("spelling", ["result", "merged", "products"])
def test_no_logits_survive(spelling, trained):
    made = rewriter.optimize(model(spelling=spelling, trained=trained))
    made(IDS, LABELS).backward()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        made(IDS, LABELS).backward()
    fused(rewriter.report(made))
    assert kept and not [shape for shape in kept if shape.numel() >= (B * T - B) * V]


def test_without_a_gradient():
    made, eager = model(dropout=0.3), model(dropout=0.3)
    rewriter.optimize(made.eval())
    made(IDS, LABELS)
    with torch.no_grad():
        torch.testing.assert_close(made(IDS, LABELS), eager.eval()(IDS, LABELS))
    fused(rewriter.report(made))


def test_backward_twice_and_accumulation():
    made, eager = model(trained=True), model(trained=True)
    rewriter.optimize(made)
    for m in (made, eager):
        loss = m(IDS, LABELS)
        loss.backward(retain_graph=True)
        loss.backward()
        m(IDS.flip(0), LABELS).backward()
    for (name, p), q in zip(made.named_parameters(), eager.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_what_is_no_adapter_stays():
    """Something between the two matrices, or an input of another shape: all logits are there, and the loss is fused."""

    class Other(Model):
        def forward(self, ids, labels):
            h = self.body(self.embed(ids))
            return self.loss(self.head(h) + self.up(torch.relu(self.down(h))), labels)

    torch.manual_seed(0)
    *_, report = assert_trains_alike(Other(), [(IDS, LABELS)])
    assert [r.details.get("logits") for r in report.rewrites] == ["kept: a sum of products"]


def test_an_adapter_of_some_rows_stays():
    class Other(Model):
        def forward(self, ids, labels):
            h = self.body(self.embed(ids))
            return self.loss(self.head(h) + self.up(self.down(h[:, :1])), labels)

    torch.manual_seed(0)
    *_, report = assert_trains_alike(Other(), [(IDS, LABELS)])
    assert report.sites("cross_entropy") and not report.sites("linear_cross_entropy")


def test_logits_that_something_else_reads_stay():
    class Other(Model):
        def forward(self, ids, labels):
            h = self.body(self.embed(ids))
            z = self.head(h) + self.up(self.down(h))
            return self.loss(z, labels) + z.square().mean()

    torch.manual_seed(0)
    *_, report = assert_trains_alike(Other(), [(IDS, LABELS)])
    assert report.sites("cross_entropy") and not report.sites("linear_cross_entropy")
