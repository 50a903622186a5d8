"""A kernel that takes for dense what isn't is found out by its proof, whose inputs are laid out as the model's."""

import torch
from torch import nn

import rewriter
from rewriter import Call, Pattern, Reference


def takes_all_for_dense(x, v):
    return torch.tanh(x * v.as_strided(v.shape, (1,), v.storage_offset()))


class Scaled(Pattern):
    """tanh(x * v)."""

    name = "scaled"
    references = (Reference(lambda x, v: torch.tanh(x * v), {"x": (3, 5), "v": (5,)}),)

    def replacement(self, match):
        return Call(takes_all_for_dense, (match["x"], match["v"]))


class Model(nn.Module):
    def __init__(self, columns):
        super().__init__()
        self.table, self.columns = nn.Parameter(torch.randn(5, columns)), columns

    def forward(self, x):
        return torch.tanh(x * self.table[:, self.columns // 2])


def places(columns):
    model = Model(columns)
    x = torch.randn(7, 5)
    expected = model(x)
    rewriter.optimize(model, patterns=[Scaled])
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    report = rewriter.report(model)
    return report.sites("scaled"), [miss.reason for miss in report.near_misses]


def test_dense_vector():
    sites, reasons = places(1)
    assert len(sites) == 1 and not reasons


def test_column():
    sites, (reason,) = places(3)
    assert not sites and "error nan" in reason
