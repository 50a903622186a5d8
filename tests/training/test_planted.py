"""A faulty pattern in the place of a built-in one: training is that of the eager model, and the report says why."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training import planted
from training.common import assert_trains_alike
from training.handwritten import WIDTH, Gated, Norm, rotary_half

import rewriter


class Small(nn.Module):
    """The first norm reads an input without gradient; dropout shows whether random state or layout changed."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.feed = Norm(), Norm(), Gated()

    def forward(self, x, target):
        q, k = rotary_half(x), rotary_half(2 * x)
        x = F.dropout(self.first(x) + q * k, 0.1) + x
        x = x + self.feed(self.second(x))
        return F.mse_loss(F.dropout(x, 0.1), target)


def steps():
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(n, 6, WIDTH, generator=generator) for _ in range(2)) for n in (3, 4)]


def train(pattern, batches=1):
    return assert_trains_alike(Small(), steps()[:batches], options={"patterns": [pattern]})[2]


def test_without_a_fault():
    report = train(planted.unchanged(), batches=2)
    assert report.coverage() == {"rms_norm": (2, 2), "rotary": (1, 1), "glu": (1, 1)}


# One site lacks these faults: its input needs no gradient, and matched without its weight it has no offset.
NOT_EVERYWHERE = ("backward of x", "gradient of x missing", "gradient of another shape", "detached", "offset")


@pytest.mark.parametrize("fault", planted.WRONG)
def test_caught(fault):
    pattern = planted.WRONG[fault]
    report = train(pattern)
    refused = [miss for miss in report.near_misses if miss.pattern == pattern.name]
    assert refused and all(isinstance(miss.reason, str) and miss.reason for miss in refused)
    if fault not in NOT_EVERYWHERE:
        assert not report.sites(pattern.name), f"{fault}: still applied"
    others = {"rms_norm", "rotary", "glu"} - {pattern.name}
    assert all(report.sites(name) for name in others), "a fault in one pattern stopped another"
    assert str(report) and report.to_json()


@pytest.mark.parametrize("fault", planted.HARMLESS)
def test_does_no_harm(fault):
    pattern = planted.HARMLESS[fault]
    report = train(pattern)
    names = {"rms_norm", "rotary", "glu"} - {pattern.name}
    assert all(report.sites(name) for name in names), "a fault in one pattern stopped another"
    done, seen = report.coverage().get(pattern.name, (0, 0))
    assert done <= 2 and (done == 2 or seen > done), "neither applied nor refused"


def test_strict_raises_for_a_planted_fault():
    with pytest.raises(rewriter.RewriteError, match="verification"):
        rewriter.optimize(Small(), patterns=[planted.WRONG["constant"]], strict=True)(*steps()[0])
