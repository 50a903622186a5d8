"""Graphs at the edges of the patterns: same values, gradients, layouts and side effects as eager, rewritten or not."""

import copy

import pytest
import torch
from torch import nn
from training.graphs import GRAPHS

import rewriter

FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


class Graph(nn.Module):
    """Tensors without a gradient are arguments, the others parameters and arguments alternately."""

    def __init__(self, function, inputs):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(t.detach().clone()) for t in inputs[1:] if t.requires_grad)
        self.rest = [t for t in inputs[1:] if not t.requires_grad]

    def forward(self, x):
        # one by one: Dynamo of torch 2.11 can't unpack a ParameterList
        weights = [self.weights[i] for i in range(len(self.weights))]
        return self.function(x, *weights, *self.rest)


def run(model, x):
    x = x.detach().clone().requires_grad_(x.requires_grad)
    given = x if not x.requires_grad else x.view_as(x)
    outputs = model(given)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    torch.autograd.backward(outputs, upstream)
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    named |= {"gradient of x": x.grad, "x afterwards": given.detach()}
    return named | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", GRAPHS)
def test_same_as_eager(name):
    function, inputs, expected = GRAPHS[name]
    model = Graph(function, inputs)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    exact.rest = [t.double() for t in exact.rest]
    new = run(rewriter.optimize(model), inputs[0])
    old, truth = run(eager, inputs[0]), run(exact, inputs[0].detach().double().requires_grad_(inputs[0].requires_grad))
    for what, was in old.items():
        got = new[what]
        assert (got is None) == (was is None), what
        if was is None:
            continue
        assert (got.shape, got.dtype) == (was.shape, was.dtype), what
        if what.startswith("output"):
            assert _strides(got) == _strides(was), what
        assert torch.equal(got.isnan(), was.isnan()), what
        error, allowed = (got.double() - truth[what]).norm(), 2 * (was.double() - truth[what]).norm()
        floor = max(FLOOR[t.dtype] for t in inputs) if _mixed(inputs) else FLOOR[was.dtype]
        if name.startswith(("wide", "late")):
            floor = max(floor, FLOOR[torch.float32])  # the graph itself passes through float32
        assert not error > allowed + floor * truth[what].norm(), f"{what}: error {error:.2e}, allowed {allowed:.2e}"
    report = rewriter.report(model)
    assert not report.fallbacks
    if expected is not None:
        assert {n: done for n, (done, _) in report.coverage().items() if done} == expected, report.near_misses


def _strides(t):
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def _mixed(inputs):
    return len({t.dtype for t in inputs}) > 1
