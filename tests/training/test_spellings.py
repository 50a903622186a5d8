"""Whatever way a computation is written, it is found, and its values and gradients are those of eager."""

import copy

import pytest
import torch
from torch import nn
from training.common import relative
from training.spellings import CAUSAL, SPELLINGS

import rewriter


class Spelled(nn.Module):
    def __init__(self, function, inputs):
        super().__init__()
        self.function = function
        self.inputs = nn.ParameterList(nn.Parameter(t.clone()) for t in inputs)

    def forward(self):
        # one by one: Dynamo of torch 2.11 can't unpack a ParameterList
        return self.function(*[self.inputs[i] for i in range(len(self.inputs))])


def run(model):
    outputs = model()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    sum((o * torch.randn(o.shape, generator=generator)).sum() for o in outputs).backward()
    return [o.detach() for o in outputs] + [p.grad for p in model.parameters()]


def report_of(name):
    _, function, inputs = SPELLINGS[name]
    model = Spelled(function, inputs)
    eager = copy.deepcopy(model)
    for new, old in zip(run(rewriter.optimize(model)), run(eager), strict=True):
        assert new.shape == old.shape and new.dtype == old.dtype
        assert relative(new, old) < 1e-5
    report = rewriter.report(model)
    assert not report.fallbacks
    return report


@pytest.mark.parametrize("name", SPELLINGS)
def test_is_found(name):
    report = report_of(name)
    assert report.sites(SPELLINGS[name][0]), report.near_misses


@pytest.mark.parametrize("name", CAUSAL)
def test_a_mask_made_of_sizes_alone_is_causal(name):
    (rewrite,) = report_of(f"attention: {name}").rewrites
    assert rewrite.details == {"masks": "causal", "grouped": True}
