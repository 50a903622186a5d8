"""Graphs run eagerly: activation checkpointing inside a captured graph."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rewriter


class Once(nn.Module):
    """A norm and dropout, checkpointed inside the forward that is captured."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.drop = nn.RMSNorm(16), nn.Linear(16, 16), nn.Dropout(0.5)

    def work(self, x):
        return self.drop(torch.tanh(self.linear(self.norm(x))))

    def forward(self, x):
        return checkpoint(self.work, x, use_reentrant=False)


class Twice(Once):
    def forward(self, x):
        return checkpoint(lambda y: self.drop(checkpoint(self.work, y, use_reentrant=False)), x, use_reentrant=False)


@pytest.mark.parametrize("kind", [Once, Twice])
def test_checkpointed_dropout_draws_the_same_twice(kind):
    model = kind()
    eager = copy.deepcopy(model)
    rewriter.optimize(model, executor="eager")
    x = torch.randn(6, 16)
    for m in (model, eager):
        torch.manual_seed(7)
        m(x).square().sum().backward()
    for new, old in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(new.grad, old.grad, rtol=1e-5, atol=1e-6)
    assert rewriter.report(model).sites("rms_norm") == ["norm"]
