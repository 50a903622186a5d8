"""The pattern `lora` by hand: what is the same computation is found, what is not says why; all of it trains alike."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training.common import assert_trains_alike

import rewriter

D, N, R = 8, 12, 3


class Written(nn.Module):
    """A frozen layer between two trained ones, and what an adapter may be made of."""

    def __init__(self, spelling, trained=False):
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.first, self.last = nn.Linear(D, D), nn.Linear(N, 5)
        self.layer, self.other = nn.Linear(D, N), nn.Linear(D, N, bias=False)
        self.columns, self.row = nn.Parameter(torch.randn(D, N)), nn.Parameter(torch.randn(N))
        self.packed, self.filters = nn.Parameter(torch.randn(3 * N, D)), nn.Parameter(torch.randn(N, D, 1))
        self.table = nn.Parameter(torch.randn(20, N))
        for p in (*self.layer.parameters(), *self.other.parameters(), self.columns, self.row, self.packed,
                  self.filters, self.table):  # fmt: skip
            p.requires_grad_(trained)
        self.a, self.b = nn.Parameter(torch.randn(R, D)), nn.Parameter(torch.randn(N, R))
        self.a2, self.b2 = nn.Parameter(torch.randn(5, D)), nn.Parameter(torch.randn(N, 5))
        self.c, self.d = nn.Parameter(torch.randn(D, R)), nn.Parameter(torch.randn(R, N))
        self.tokens = nn.Parameter(torch.randn(20, R))
        self.scale, self.gain = nn.Buffer(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.7))
        self.over_outputs, self.over_ranks = nn.Parameter(torch.randn(N)), nn.Parameter(torch.randn(R))

    def forward(self, x):
        y = self.spelling(self, torch.tanh(self.first(x)))
        return self.last(torch.tanh(y)).square().mean()

    def branch(self, x):
        return F.linear(F.linear(x, self.a), self.b)

    def second(self, x):
        return F.linear(F.linear(x, self.a2), self.b2)


def written(spelling, trained=False):
    batches = [(torch.randn(n, 4, D, generator=torch.Generator().manual_seed(n)),) for n in (2, 3)]
    *_, report = assert_trains_alike(Written(spelling, trained), batches)
    return report


def misses(report):
    return [miss.reason for miss in report.near_misses if miss.pattern == "lora"]


def dropped(m, x):
    return F.dropout(x, 0.2, m.training)


def of_columns(m, x):
    y = torch.addmm(m.row, x.view(-1, D), m.columns).view(*x.shape[:-1], N)
    return y + m.branch(dropped(m, x)) * 0.5


def by_addmm(m, x):
    rows = x.reshape(-1, D)
    return torch.addmm(m.layer(rows), rows @ m.a.t(), m.b.t(), alpha=0.5).view(*x.shape[:-1], N)


def by_einsum(m, x):
    u = torch.einsum("btd,rd->btr", x, m.a)
    return m.layer(x) + torch.einsum("btr,or->bto", u, m.b) * 2


def in_place(m, x):
    y = m.layer(x)
    y += m.branch(x)
    return y


def written_later(m, x):
    y = m.layer(x) + m.branch(x)
    y.mul_(2)
    return y


def one_after_the_other(m, x):
    y = m.layer(x) + m.branch(x) * 0.5
    return y + m.second(x) * 0.25


def of_one_dropout(m, x):
    z = dropped(m, x)
    return m.layer(x) + m.branch(z) * 0.5 + m.second(z) + F.linear(F.linear(z, m.c.T), m.d.T) * -2


def on_one_vector(m, x):
    row = x.reshape(-1, D)[0]
    return m.layer(row) + m.branch(row)


FOUND = {
    "between": lambda m, x: F.linear(F.linear(x, m.a) * 0.5, m.b) + m.layer(x),
    "before": lambda m, x: m.layer(x) + F.linear(F.linear(0.5 * x, m.a), m.b),
    "two numbers": lambda m, x: m.layer(x) + F.linear(F.linear(x, m.a) * 0.5, m.b) / 3,
    "branch first": lambda m, x: m.branch(x) * 0.5 + m.layer(x),
    "products": lambda m, x: m.layer(x) + (x @ m.c @ m.d) / 4,
    "transposes": lambda m, x: m.other(x) + x @ m.a.T @ m.b.T,
    "addmm": by_addmm,
    "einsum": by_einsum,
    "add with a factor": lambda m, x: torch.add(m.layer(x), m.branch(x), alpha=0.5),
    "in place": in_place,
    "written later": written_later,
    "scaled B": lambda m, x: m.layer(x) + F.linear(F.linear(x, m.a), m.b * 0.5),
    "scaled A": lambda m, x: m.layer(x) + F.linear(F.linear(x, m.a * 0.5), m.b),
    "scale in a buffer": lambda m, x: m.layer(x) + m.branch(x) * m.scale,
    "trained scale": lambda m, x: m.layer(x) + m.gain * m.branch(x),
    "divided by a tensor": lambda m, x: m.layer(x) + m.branch(x) * 0.5 / (m.scale + 1),
    "trained factors": lambda m, x: (
        m.layer(x) + m.over_outputs * F.linear(m.over_ranks * F.linear(x, m.a.detach()), m.b.detach())
    ),
    "bias of its own": lambda m, x: m.layer(x) + F.linear(F.linear(x, m.a), m.b, m.over_outputs) * 0.5,
    "bias behind": lambda m, x: m.other(x) + m.branch(x) + m.row,
    "weight by columns": lambda m, x: x @ m.columns + m.row + m.branch(x),
    "regrouped, with dropout": of_columns,
    "view of a packed weight": lambda m, x: F.linear(x, m.packed[N : 2 * N]) + m.branch(x),
    "in the weight": lambda m, x: F.linear(x, m.layer.weight + 0.5 * (m.b @ m.a), m.layer.bias),
    "multiplied out": lambda m, x: m.layer(x) + x @ (m.c @ m.d) * 0.5,
    "casts": lambda m, x: m.layer(x) + (F.linear(F.linear(x.double(), m.a.double()), m.b.double()) * 0.5).to(x.dtype),
    "several": one_after_the_other,
    "several, added up first": lambda m, x: m.layer(x) + (m.branch(x) * 0.5 + m.second(x)),
    "several of one dropout": of_one_dropout,
    "another input": lambda m, x: m.layer(x) + m.branch(x.flip(0)),
    "rows not in order": lambda m, x: m.layer(x.transpose(0, 1)) + m.branch(x.transpose(0, 1)),
    "one vector": on_one_vector,
    "input without gradient": lambda m, x: m.layer(x.detach()) + m.branch(x.detach()),
    "branch without": lambda m, x: m.layer(x) + m.branch(x.detach()),
    "A is frozen": lambda m, x: m.layer(x) + F.linear(F.linear(x, m.a.detach()), m.b),
    "B is frozen": lambda m, x: m.layer(x) + F.linear(F.linear(x, m.a), m.b.detach()),
    "no elements": lambda m, x: m.layer(x[:0]).sum() + (m.layer(x[:0]) + m.branch(x[:0])).sum() + m.layer(x),
}


@pytest.mark.parametrize("spelling", FOUND)
def test_found(spelling):
    report = written(FOUND[spelling])
    assert len(report.sites("lora")) == 1
    assert not misses(report)


def test_several_are_one_of_the_sum_of_their_ranks():
    for spelling, ranks, adapters in ((one_after_the_other, R + 5, 2), (of_one_dropout, 2 * R + 5, 3)):
        (details,) = (r.details for r in written(spelling).rewrites if r.pattern == "lora")
        assert (details["rank"], details["adapters"]) == (ranks, adapters)


def siblings(m, x):
    z = dropped(m, x)
    second = m.other(x) + 3 * F.linear(F.linear(z, m.c.T), m.d.T)
    return (m.layer(x) + 2 * m.branch(z)) * torch.sigmoid(second)


def shared_down(m, x):
    second = m.other(x) + 2 * F.linear(F.linear(x, m.a), m.d.t())
    return (m.layer(x) + m.branch(x)) * torch.sigmoid(second)


def one_adapter_of_two_layers(m, x):
    y = torch.tanh(m.layer(x) + m.branch(x))[..., :D]
    return m.other(y) + m.branch(y)


def one_layer_twice(m, x):
    return (m.layer(x) + m.branch(x)) * torch.sigmoid(m.layer(x) + m.second(x))


@pytest.mark.parametrize(
    "spelling, calls, layers",
    [(siblings, 1, 2), (shared_down, 1, 2), (one_adapter_of_two_layers, 2, 1), (one_layer_twice, 1, 2)],
)
def test_tensors_that_two_places_share(spelling, calls, layers):
    details = [r.details["layers"] for r in written(spelling).rewrites if r.pattern == "lora"]
    assert details == [layers] * calls


def base_used_again(m, x):
    y = m.layer(x)
    return y + m.branch(x) * 0.5 + y.abs()


def branch_used_again(m, x):
    d = m.branch(x)
    return (m.layer(x) + d) * (m.other(x) + d)


def base_written_later(m, x):
    y = m.layer(x)
    z = y + m.branch(x)
    y.mul_(2)
    return z + y


def parts_of_packed(m, x):
    q, k, v = F.linear(x, m.packed).chunk(3, -1)
    return (q + m.branch(x) * 0.5) * torch.sigmoid(k) + v


def joined_parts(m, x):
    first = m.branch(x)
    y = F.linear(x, m.packed) + torch.cat((first, torch.zeros_like(first), m.second(x)), -1) * 0.5
    return y[..., :N] + y[..., -N:]


def without_gradient(m, x):
    with torch.no_grad():
        y = m.layer(x)
    return y + m.branch(x)


def weight_decomposed(m, x):
    weight = m.layer.weight + 0.5 * m.b @ m.a
    norm = m.over_outputs / weight.norm(dim=1).detach()
    return m.layer(x) + ((norm - 1) * F.linear(x, m.layer.weight) + norm * m.branch(x) * 0.5)


class Foreign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.saved_tensors[0], None


def of_a_foreign_product(m, x):
    return Foreign.apply(x, m.other.weight) + m.branch(x) * 0.5


def of_embeddings(m, x):
    ids = torch.arange(4, device=x.device) * 3
    return F.embedding(ids, m.table) + F.embedding(ids, m.tokens) @ m.b.T * 0.5 + m.other(x)


def of_convolutions(m, x):
    x = x.transpose(1, 2)
    y = F.conv1d(x, m.filters, m.row) + F.conv1d(F.conv1d(x, m.a[..., None]), m.b[..., None]) * 0.5
    return y.transpose(1, 2)


def of_high_rank(m, x):
    a, b = torch.cat([m.a] * 100), torch.cat([m.b] * 100, 1)
    return m.layer(x) + F.linear(F.linear(x, a), b) * 0.01


STAYS = {
    base_used_again: "is used again by",
    branch_used_again: "is used again by",
    base_written_later: "is used again by",
    parts_of_packed: "a part of what its layer gives",
    joined_parts: "each adapter is added to a part",
    without_gradient: "grad mode or autocast changes",
    weight_decomposed: "weight-decomposed",
    of_a_foreign_product: "product is made by autograd_function_apply",
    of_embeddings: "one of an embedding",
    of_convolutions: "one of a convolution",
    of_high_rank: "the rank of the adapter is 300",
}
OTHERS = {
    "activation": (lambda m, x: m.layer(x) + F.linear(F.relu(F.linear(x, m.a)), m.b), "relu stands between"),
    "dropout": (lambda m, x: m.layer(x) + F.linear(dropped(m, F.linear(x, m.a)), m.b), "dropout stands between"),
    "gate": (lambda m, x: m.layer(x) + F.linear(F.linear(x, m.a) * x[..., :1], m.b), "a tensor of shape [2, 4, 1]"),
    "no matrices": (lambda m, x: m.layer(x) * m.over_outputs, "no matrices to add"),
    "something else": (lambda m, x: m.layer(x) + x.sum(-1, True) + m.branch(x), "something else is added"),
}


@pytest.mark.parametrize(
    "spelling, reason",
    [
        *(pytest.param(f, why, id=f.__name__) for f, why in STAYS.items()),
        *(pytest.param(*row, id=name) for name, row in OTHERS.items()),
    ],
)
def test_what_stays_says_why(spelling, reason):
    report = written(spelling)
    assert not report.sites("lora")
    assert any(reason in why for why in misses(report)), misses(report)


def test_the_first_of_several_with_dropouts_of_their_own():
    def spelling(m, x):
        return m.layer(x) + m.branch(dropped(m, x)) + m.second(dropped(m, x))

    report = written(spelling)
    assert len(report.sites("lora")) == 1
    assert any("inputs of their own" in why for why in misses(report))


def test_a_trained_layer_stays():
    report = written(FOUND["between"], trained=True)
    assert not report.sites("lora")
    assert any("weight is trained" in why for why in misses(report))


def test_no_word_about_other_sums_of_products():
    """Blocks with attention and feed-forward side by side add up two products as well."""

    def spelling(m, x):
        return m.layer(x) + F.linear(torch.tanh(m.packed_up(x)), m.packed_down)

    class Parallel(Written):
        def __init__(self):
            super().__init__(spelling)
            self.packed_up = nn.Linear(D, 4 * D)
            self.packed_down = nn.Parameter(torch.randn(N, 4 * D))

    *_, report = assert_trains_alike(Parallel(), [(torch.randn(2, 4, D),)])
    assert not misses(report)


def test_second_derivatives_are_refused_not_wrong():
    model = rewriter.optimize(Written(FOUND["between"]))
    wanted = [model.a, model.b, model.first.weight]
    gradients = torch.autograd.grad(model(torch.randn(2, 4, D)), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in gradients).backward()
