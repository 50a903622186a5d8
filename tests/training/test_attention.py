"""Attention that a model writes out: its random numbers, its probabilities, its causal masks, queries without keys."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training.common import assert_trains_alike, relative

import rewriter

WIDTH, HEADS = 16, 2


def causal(scores):
    n = scores.shape[-1]
    return scores + torch.triu(torch.full((n, n), -torch.inf), 1)


def earlier(scores):
    return scores.masked_fill(~torch.ones(scores.shape[-2:]).tril(-1).bool(), -1e9)


class Block(nn.Module):
    def __init__(self, masked=causal, dropout=0.0, returns=False):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.masked, self.dropout, self.returns = masked, dropout, returns

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = self.masked(q @ k.mT / (WIDTH // HEADS) ** 0.5)
        p = F.dropout(scores.softmax(-1), self.dropout, self.training)
        x = x + F.dropout(self.out((p @ v).transpose(1, 2).flatten(2)), self.dropout, self.training)
        return (x, p) if self.returns else x


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.blocks = nn.ModuleList(Block(**options) for _ in range(2))
        self.returns = options.get("returns", False)

    def forward(self, x):
        total = 0.0
        for block in self.blocks:
            x = block(x)
            if self.returns:
                x, p = x
                total = total + p.square().sum()
        return x.square().mean() + total


def steps(*lengths):
    return [(torch.randn(2, n, WIDTH, generator=torch.Generator().manual_seed(n)),) for n in lengths]


def details(report):
    return [r.details for r in report.rewrites if r.pattern == "attention"]


def test_dropout_draws_what_the_model_draws():
    _, _, report = assert_trains_alike(Model(dropout=0.3), steps(7, 9, 7))
    assert all(d["dropout"] == 0.3 for d in details(report)) and details(report)


def test_dropout_between_the_draw_and_the_product_keeps_its_place():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Parameter(torch.randn(2, HEADS, 5, 8))

        def forward(self, x):
            p = F.dropout((self.q @ self.q.mT).softmax(-1), 0.5)
            return (p @ F.dropout(self.q * x, 0.5)).sum()  # draws after the probabilities, before their product

    report = assert_trains_alike(Between(), [(torch.ones(()),)] * 2)[2]
    assert not details(report)
    assert any("draws random numbers" in m.reason for m in report.near_misses)


def test_a_causal_mask_is_causal_at_every_length():
    report = assert_trains_alike(Model(), steps(7, 9, 12, 5))[2]
    assert details(report) and all(d == {"masks": "causal"} for d in details(report))


def test_a_window_is_not_causal_however_short_the_first_batch():
    def window(scores):
        i = torch.arange(scores.shape[-1])
        distance = i[:, None] - i
        return scores.masked_fill((distance < 0) | (distance > 8), -torch.inf)

    report = assert_trains_alike(Model(masked=window), steps(6, 8, 20, 30))[2]
    assert {"masks": ("drop",)} in details(report)  # at 6 tokens alone it is causal


def positions(scores, dtype=torch.int64):
    i = torch.arange(scores.shape[-1]).to(dtype)
    return i[:, None], i


def floors(scores):
    i, j = positions(scores)
    return scores.masked_fill(j > i + torch.div(i, 12, rounding_mode="floor"), -torch.inf)


def scaled(scores):
    i, j = positions(scores)
    return scores.masked_fill(j * 1.05 > i + 0.9, -torch.inf)  # from 18 on no query sees its own position


def last_of_them(scores):
    (i, j), first = positions(scores), max(scores.shape[-1] - 16, 0)
    return scores.masked_fill((j > i) | ((j < first) & (i >= first)), -torch.inf)


def rounded(scores):
    i, j = positions(scores, torch.bfloat16)
    return scores.masked_fill(j > i, -torch.inf)  # from 256 on neighbours have the same number


@pytest.mark.parametrize(
    "masked, lengths", [(floors, (6, 9, 30)), (scaled, (6, 9, 30)), (last_of_them, (6, 9, 30)), (rounded, (6, 9, 270))]
)
def test_what_looks_causal_at_first_is_what_it_is(masked, lengths):
    assert_trains_alike(Model(masked=masked), steps(*lengths))


def test_queries_that_see_no_key():
    model = Model(masked=earlier).double().float()
    report = assert_trains_alike(model, steps(7, 9))[2]
    assert details(report)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_probabilities_that_a_block_returns(dropout):
    """Without dropout they are computed on demand; with it attention stays, as later it would draw other numbers."""
    report = assert_trains_alike(Model(returns=True, dropout=dropout), steps(7, 9))[2]
    assert bool(details(report)) == (dropout == 0.0)


def test_returned_probabilities_are_those_of_eager():
    model = Block(returns=True)
    eager = copy.deepcopy(model)
    (x,) = steps(6)[0]
    rewriter.optimize(model)
    new, old = model(x), eager(x)
    assert relative(new[1], old[1]) < 1e-6 and new[1].shape == old[1].shape
    (new[1] ** 2).sum().backward()
    (old[1] ** 2).sum().backward()
    assert relative(model.qkv.weight.grad, eager.qkv.weight.grad) < 1e-5


class Checkpointed(nn.Module):
    """Its blocks, and its head with the loss, are recomputed in backward; probabilities and logits are returned too."""

    def __init__(self, reentrant):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(returns=True) for _ in range(2)), nn.Linear(WIDTH, 11)
        self.options = {"use_reentrant": reentrant}

    def forward(self, x):
        x, total = x.detach().requires_grad_(), 0.0
        for block in self.blocks:
            x, p = checkpoint(block, x, **self.options)
            total = total + p.square().sum()
        loss, logits = checkpoint(self.tail, x, **self.options)
        return loss + logits.square().mean() + total

    def tail(self, x):
        logits = self.head(x)
        return F.cross_entropy(logits.flatten(0, 1), torch.arange(logits[..., 0].numel()) % 11), logits


@pytest.mark.parametrize("reentrant", [False, True])
def test_results_of_recomputed_pieces(reentrant):
    assert_trains_alike(Checkpointed(reentrant), steps(7, 9, 7))
