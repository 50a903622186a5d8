"""A head and loss of somebody else, in the model or over its forward, train as they did, and the report says so."""

import copy
import functools
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training.common import TOLERANCE, assert_same_gradients, assert_trains_alike, relative
from training.models import batch, build, with_lora

import rewriter

B, T, D, V = 2, 7, 8, 30
IDS = torch.arange(B * T).view(B, T) * 11 % V
FUSED = "linear_cross_entropy"


class TokenLosses(torch.autograd.Function):
    """Losses of rows [N, D] against a weight [V, D], or their mean: the logits are made again in backward."""

    @staticmethod
    def forward(ctx, h, weight, bias, labels, mean):
        ctx.save_for_backward(h, weight, bias, labels)
        ctx.mean = mean
        losses = F.cross_entropy(F.linear(h, weight, bias).float(), labels, reduction="none")
        return losses.mean() if mean else losses

    @staticmethod
    def backward(ctx, upstream):
        h, weight, bias, labels = ctx.saved_tensors
        upstream = upstream / len(labels) if ctx.mean else upstream[:, None]
        dz = (F.linear(h, weight, bias).softmax(-1) - F.one_hot(labels, len(weight))) * upstream
        return dz @ weight, dz.t() @ h, None if bias is None else dz.sum(0), None, None


@torch.library.custom_op("rewriter_tests::experts", mutates_args=())
def experts(x: torch.Tensor, weight: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    """Rows, a matrix and an integer a row, too, but rows come out: a router of experts, say."""
    return x * weight[choice]


experts.register_fake(lambda x, weight, choice: torch.empty_like(x))
experts.register_autograd(
    lambda ctx, g: (g * ctx.saved_tensors[1][ctx.saved_tensors[2]], None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def fused(h, weight, bias, labels):
    return TokenLosses.apply(h, weight, bias, labels, True)


OTHERS = {
    "plain": lambda h, w, b, t: F.cross_entropy(F.linear(h, w, b), t),
    "checkpointed": lambda h, w, b, t: checkpoint(OTHERS["plain"], h, w, b, t, use_reentrant=False),
    "experts": lambda h, w, b, t: experts(h, w, t).square().mean(),
    "no loss": lambda h, w, b, t: F.linear(h, w, b).square().mean(),
}


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) for _ in range(2)])

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return x


class Model(nn.Module):
    def __init__(self, tail, bias=False):
        super().__init__()
        self.body, self.head, self.tail = Body(), nn.Linear(D, V, bias), tail

    def forward(self, ids):
        h = self.body(ids)[:, :-1].reshape(-1, D)
        return self.tail(h, self.head.weight, self.head.bias, ids[:, 1:].reshape(-1))


@pytest.mark.parametrize("bias", [False, True])
def test_behind_a_body(bias):
    *_, report = assert_trains_alike(Model(fused, bias), [(IDS,)] * 2)
    assert len(report.kept) == 1 and report.coverage() == {FUSED: (1, 1)} and not report.notes


@pytest.mark.parametrize("name", OTHERS)
def test_other_tails_are_not_taken_for_fused_ones(name):
    *_, report = assert_trains_alike(Model(OTHERS[name]), [(IDS,)])
    assert not report.kept and not report.notes
    assert len(report.sites(FUSED)) == (name in ("plain", "checkpointed"))


def test_not_looked_for_where_the_pattern_is_left_out():
    *_, report = assert_trains_alike(Model(fused), [(IDS,)], options={"exclude": [FUSED]})
    assert not report.kept


def put_fused_head_over(model):
    """As a trainer does that brings its own head: over the forward of the model, which is called for all else."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def own_forward(self, *args, own_head=False, labels=None, **kwargs):
        if not own_head:
            return original(*args, labels=labels, **kwargs)
        h = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        head, targets = self.get_output_embeddings(), labels[:, 1:].flatten()
        losses = TokenLosses.apply(h, head.weight, None, targets.clamp(min=0), False)
        return {"losses": losses.masked_fill(targets == -100, 0), "loss": losses[targets != -100].mean()}

    model.forward = types.MethodType(own_forward, model)


@pytest.mark.parametrize("lora", [False, True])
def test_head_of_a_trainer(lora):
    """The blocks are optimised, the rest is the trainer's; without its argument, head and loss are the model's."""
    models = [build("Llama"), build("Llama")]
    models = [with_lora(m) for m in models] if lora else models
    rewriter.optimize(models[0])
    results = []
    for m in models:
        put_fused_head_over(m.get_base_model() if lora else m)
        m.train()
        row = m(**batch((2, 16)), own_head=True)
        row["loss"].backward()
        results.append(row)
    assert relative(results[0]["losses"], results[1]["losses"]) <= TOLERANCE
    assert_same_gradients(*models)
    report = rewriter.report(models[0])
    (note,) = [n for n in report.notes if "own_forward took the place of the outermost forward" in n]
    assert note in " ".join(str(report).split())
    assert len(report.sites("rms_norm")) == 5 and not report.sites(FUSED)
    for m in models:
        m.zero_grad()
        m(**batch((2, 16))).loss.backward()
    assert_same_gradients(*models)
    assert len(rewriter.report(models[0]).sites(FUSED)) == 1


def test_body_called_by_the_loop():
    model = Model(None)
    eager = copy.deepcopy(model)
    for m in (rewriter.optimize(model), eager):
        fused(m.body(IDS).flatten(0, 1), m.head.weight, None, IDS.flatten()).backward()
    assert_same_gradients(model, eager)
    assert not rewriter.report(model).notes
