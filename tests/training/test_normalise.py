"""Changes to the real graph leave everything as it was: memory, rounding, effects."""

import copy

import pytest
import torch
from torch import nn
from training.common import relative

import rewriter


class Of(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(4))
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def both(function, x, **modules):
    model = Of(function, **modules)
    eager = copy.deepcopy(model)
    return [(m, m(x.clone().requires_grad_(x.is_floating_point()))) for m in (rewriter.optimize(model), eager)]


def test_results_that_were_apart_stay_apart():
    def twice(m, x):
        a, b = ((x.detach().t().contiguous()).view(-1) for _ in range(2))
        zeros = [torch.zeros(3).unsqueeze(0) for _ in range(2)]
        return (m.weight * 1, a, b, *zeros)

    for _, (_, a, b, c, d) in both(twice, torch.randn(4, 4)):
        a.add_(1)
        c.add_(1)
        assert not torch.equal(a, b) and not torch.equal(c, d)


def test_each_cast_rounds_its_own_gradient():
    def many(m, x):
        return sum((m.weight.to(torch.bfloat16) * (1 + i * 2.0**-7)).float().sum() for i in range(7))

    (new, a), (old, b) = both(many, torch.randn(4))
    a.backward()
    b.backward()
    assert torch.equal(new.weight.grad, old.weight.grad)


@pytest.mark.parametrize("frozen", [False, True])
def test_running_statistics_are_kept(frozen):
    def statistics(m, x):
        m.norm(x)  # for its statistics alone
        m.norm(x)
        return m.weight.sum() * x.sum()

    norm = nn.BatchNorm1d(4)
    norm.requires_grad_(not frozen)
    (new, _), (old, _) = both(statistics, torch.randn(8, 4) + 3, norm=norm)
    assert torch.equal(new.norm.running_mean, old.norm.running_mean) and new.norm.running_mean.abs().sum() > 0
    assert new.norm.num_batches_tracked == old.norm.num_batches_tracked == 2


LOWEST = torch.finfo(torch.float32).min
LATER = torch.ones(6, 6).triu(1).bool()
PAD = torch.tensor([[1, 1, 0, 0, 0, 0], [0] * 6]).bool()[:, None, None]  # on the left: the first queries see nothing


def pad_bias():
    return torch.zeros(PAD.shape).masked_fill(PAD, LOWEST)


TWO_MASKS = {
    "infinite fill, then bias": lambda s: s.masked_fill(LATER, -torch.inf) + pad_bias(),
    "finite fill, then bias": lambda s: torch.where(LATER, LOWEST / 2, s) + pad_bias() / 2,
    "bias, then small fill": lambda s: (s + pad_bias()).masked_fill(LATER, -1e4),
    "two biases": lambda s: s + torch.zeros(6, 6).masked_fill(LATER, LOWEST / 2) + pad_bias() / 2,
    "two fills": lambda s: s.masked_fill(LATER, -1e9).masked_fill(PAD, -1e9),
    "two infinite fills": lambda s: s.masked_fill(LATER, -torch.inf).masked_fill(
        PAD & (torch.arange(6) > 0), -torch.inf
    ),
    "fill, scaled by a tensor": lambda s: s.masked_fill(LATER, -1e4) * torch.tensor([-1.0]),
}


@pytest.mark.parametrize("name", TWO_MASKS)
def test_masks_together(name):
    def attention(m, x):
        q = (x * m.weight)[:, None]
        return TWO_MASKS[name](q @ q.mT).softmax(-1) @ q

    (new, a), (old, b) = both(attention, torch.randn(2, 6, 4))
    assert torch.equal(a.isnan(), b.isnan())
    g = torch.randn(a.shape)
    (a * g).sum().backward()
    (b * g).sum().backward()
    assert relative(a, b) < 1e-6 and relative(new.weight.grad, old.weight.grad) < 1e-5
