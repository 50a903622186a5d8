"""A tail that another library has fused is left as it is, and the report says so."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training.common import assert_same_gradients, relative
from training.models import batch, build

import rewriter

V, D = 23, 16


class FusedHead(torch.autograd.Function):
    """Head and loss in one, with gradients made in forward, as fused heads are written."""

    @staticmethod
    def forward(ctx, x, weight, target, by_token):
        p = (x @ weight.t()).softmax(-1)
        losses = -p.gather(-1, target.unsqueeze(-1)).squeeze(-1).log()
        count = 1 if by_token else target.numel()
        dz = (p - F.one_hot(target, len(weight))) / count
        ctx.by_token = by_token
        ctx.save_for_backward(dz, x, weight)
        return losses if by_token else losses.mean()

    @staticmethod
    def backward(ctx, upstream):
        dz, x, weight = ctx.saved_tensors
        dz = dz * (upstream.unsqueeze(-1) if ctx.by_token else upstream)
        return dz @ weight, torch.einsum("nv,nd->vd", dz, x), None, None


class Doubled(torch.autograd.Function):
    """Opaque, but no tail: there are no labels."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return (x @ weight.t()).sum()

    @staticmethod
    def backward(ctx, upstream):
        x, weight = ctx.saved_tensors
        return upstream * weight.sum(0).expand_as(x), upstream * x.sum(0).expand_as(weight)


@torch.library.custom_op("somebody::fused_head", mutates_args=())
def fused_head(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x @ weight.t(), target)


@fused_head.register_fake
def _(x, weight, target):
    return x.new_empty(())


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, upstream):
    x, weight, target = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        loss = F.cross_entropy(leaves[0] @ leaves[1].t(), target)
    return *torch.autograd.grad(loss, leaves, upstream), None


fused_head.register_autograd(_backward, setup_context=_save)


class Model(nn.Module):
    def __init__(self, tail):
        super().__init__()
        self.tail, self.norm, self.head = tail, nn.RMSNorm(D), nn.Linear(D, V, bias=False)

    def forward(self, x, target):
        h = self.norm(x).flatten(0, 1)
        return self.tail(h, self.head.weight, target.flatten())


TAILS = {
    "function": (lambda *t: FusedHead.apply(*t, False), "an autograd.Function"),
    "function, by token": (lambda *t: FusedHead.apply(*t, True).sum() / 7, "an autograd.Function"),
    "operator": (lambda *t: torch.ops.somebody.fused_head(*t), "somebody::fused_head"),
}


def trained(tail):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Model(tail)
    model = rewriter.optimize(copy.deepcopy(eager))
    x, target = torch.randn(2, 9, D), torch.randint(0, V, (2, 9))
    results = []
    for m in (model, eager):
        loss = m(x, target)
        results.append([loss, *torch.autograd.grad(loss, list(m.parameters()))])
    assert all(relative(a, b) < 1e-5 for a, b in zip(*results, strict=True))
    return rewriter.report(model)


@pytest.mark.parametrize("name", TAILS)
def test_reported(name):
    tail, call = TAILS[name]
    report = trained(tail)
    assert [(k.pattern, k.call) for k in report.kept] == [("linear_cross_entropy", f"already fused by {call}")]
    assert report.coverage()["linear_cross_entropy"] == (1, 1)
    assert not any(r.pattern == "linear_cross_entropy" for r in report.rewrites)
    assert f"already fused by {call}" in str(report)


def test_another_function_is_none():
    report = trained(lambda x, weight, target: Doubled.apply(x, weight) + 0 * target.sum())
    assert not report.kept and "linear_cross_entropy" not in report.coverage()


def test_a_forward_put_over_ours_is_noted():
    """As TRL does: its forward calls the body and a fused head of its own."""
    model = build("Llama", use_cache=False)
    eager = copy.deepcopy(model)
    losses = []
    for m in (rewriter.optimize(model), eager):

        def fused_forward(self, input_ids, labels, attention_mask=None):
            hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, :-1]
            return FusedHead.apply(hidden.flatten(0, 1), self.lm_head.weight, labels[:, 1:].flatten(), False)

        m.forward = types.MethodType(fused_forward, m)
        inputs = batch((2, 16))
        loss = m(**{**inputs, "labels": inputs["input_ids"]})
        loss.backward()
        losses.append(loss)
    assert relative(*losses) <= 1e-5
    assert_same_gradients(model, eager)
    report = rewriter.report(model)
    assert len(report.sites("rms_norm")) == 5
    assert any("fused_forward took the place of the outermost forward" in note for note in report.notes)
    assert rewriter.report(model).notes == report.notes
