"""Logits that something else in the graph reads: they are built once, and the head's product is not made again."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training.common import assert_trains_alike

D, V = 8, 29
IDS = torch.arange(18).view(2, 9) * 7 % V
# What stands between the head and both its readers.
BETWEEN = {
    "nothing": lambda z: z,
    "view": lambda z: z.view(-1, V),
    "cut": lambda z: z[:, 1:].reshape(-1, V),
    "cast": lambda z: z.double().flatten(0, 1),
}


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, V))

    def forward(self, x):
        return x @ self.weight


class Model(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.embedding, self.head, self.between = nn.Embedding(V, D), nn.Linear(D, V), between

    def forward(self, ids):
        z = self.between(self.head(self.embedding(ids).tanh()))
        labels = ids.flatten()[: z.shape[:-1].numel()].view(z.shape[:-1])
        loss = F.cross_entropy(z.view(-1, V), labels.view(-1))
        return (loss + 0.1 * z.logsumexp(-1).square().mean()).float()


def products(function):
    """How many matrix products a call makes."""
    with torch.profiler.profile() as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))


@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("name", BETWEEN)
def test_one_product(name, matrix):
    model = Model(BETWEEN[name])
    if matrix:  # [D, V], multiplied from the right
        model.head = Matrix()
    model, _, report = assert_trains_alike(model, [(IDS,)])
    assert products(lambda: model(IDS)) == 1  # with its gradients, the fused head makes three
    assert len(report.sites("cross_entropy")) == 1 and not report.sites("linear_cross_entropy")
    reasons = [m.reason for m in report.near_misses if m.pattern == "linear_cross_entropy"]
    assert reasons and f"{'matmul' if matrix else 'linear'} is used again by" in reasons[0]


def test_a_view_of_what_comes_in_may_be_read_again():
    """It costs nothing: a cast of the input of a norm, say, is not made of anything that the norm computes."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(D))

        def forward(self, x):
            h = x.float()
            return (
                self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
                + h.view(-1, D).sin()
            )

    *_, report = assert_trains_alike(Norm(), [(torch.randn(5, D),)], loss_of=lambda y: y.square().mean())
    assert len(report.sites("rms_norm")) == 1
