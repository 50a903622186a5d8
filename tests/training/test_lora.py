"""The pattern `lora`: adapters of PEFT and hand-written ones train as in eager, dropout's random numbers included."""

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training.common import assert_trains_alike, near_truth
from training.models import batch, build, with_lora

import rewriter

STEPS = [batch((2, 16)), batch((3, 24), 1)]
LORA = {"patterns": ["lora"]}


@pytest.fixture
def asked(monkeypatch):
    """`rewriter.optimize` with the pattern."""
    monkeypatch.setattr(rewriter, "optimize", functools.partial(rewriter.optimize, **LORA))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"bias": "lora_only"}, {"rank_pattern": {"k_proj": 3, "up_proj": 17}}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
def test_peft(kind, options, asked):
    """By the float64 rule: with a scale of 5.7 the small gradients of keys are what is left of a cancellation."""
    model = near_truth(with_lora(build(kind, use_cache=False), **options), STEPS, contextlib.nullcontext, 2e-6)
    assert rewriter.report(model).coverage()["lora"] == (8, 8)  # layers that share their input are one place


def test_dropout():
    *_, report = assert_trains_alike(with_lora(build("Llama", use_cache=False), dropout=0.1), STEPS, options=LORA)
    assert report.coverage()["lora"] == (14, 14)  # each layer has a dropout of its own


def test_checkpointing():
    model = build("Llama", use_cache=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    *_, report = assert_trains_alike(with_lora(model, dropout=0.1), STEPS, options=LORA)
    assert report.sites("lora")


def test_not_without_being_asked():
    *_, report = assert_trains_alike(with_lora(build("Llama", use_cache=False)), STEPS[:1])
    assert not report.sites("lora") and report.sites("rms_norm")


@pytest.mark.parametrize("context", [False, True], ids=["plain", "autocast"])
def test_float32_adapters_of_bfloat16_weights(context, asked):
    model = with_lora(build("Llama", use_cache=False).bfloat16())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    context = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=context)
    model = near_truth(model, STEPS[:1], context, 8e-3)
    assert rewriter.report(model).coverage()["lora"][0] == 8


def test_weight_decomposed_ones_stay_and_train():
    model = with_lora(build("Llama", use_cache=False), use_dora=True)
    *_, report = assert_trains_alike(model, STEPS[:1], options=LORA)
    assert not report.sites("lora")


class Written(nn.Module):
    """Adapters in other styles: where the number is, which way the matrices lie, what the sum starts with."""

    def __init__(self, style, trained=False):
        super().__init__()
        torch.manual_seed(0)
        self.style, self.layer, self.other = style, nn.Linear(8, 12), nn.Linear(8, 12, bias=False)
        for p in (*self.layer.parameters(), *self.other.parameters()):
            p.requires_grad_(trained)
        self.a, self.b = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(12, 3))
        self.c, self.d = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(3, 12))
        self.out = nn.Linear(12, 5)

    def forward(self, x):
        y = getattr(self, self.style)(x)
        return self.out(torch.tanh(y)).square().mean()

    def between(self, x):
        return F.linear(F.linear(x, self.a) * 0.5, self.b) + self.layer(x)

    def before(self, x):
        return self.layer(x) + F.linear(F.linear(0.5 * x, self.a), self.b)

    def products(self, x):
        return self.layer(x) + (x @ self.c @ self.d) / 4

    def transposes(self, x):
        return self.other(x) + x @ self.a.T @ self.b.T

    def siblings(self, x):
        z = F.dropout(x, 0.2, self.training)
        first = self.layer(x) + 2 * F.linear(F.linear(z, self.a), self.b)
        second = self.other(x) + 3 * F.linear(F.linear(z, self.c.T), self.d.T)
        return first * torch.sigmoid(second)

    def base_used_again(self, x):
        y = self.layer(x)
        return y + F.linear(F.linear(x, self.a), self.b) * 0.5 + y.abs()

    def another_input(self, x):
        return self.layer(x) + F.linear(F.linear(x.flip(0), self.a), self.b)


def written(style, trained=False):
    batches = [(torch.randn(n, 4, 8, generator=torch.Generator().manual_seed(n)),) for n in (2, 3)]
    *_, report = assert_trains_alike(Written(style, trained), batches, options=LORA)
    return report


@pytest.mark.parametrize("style", ["between", "before", "products", "transposes", "siblings", "another_input"])
def test_written_by_hand(style):
    assert len(written(style).sites("lora")) == 1


def test_what_is_used_again_stays():
    report = written("base_used_again")
    assert not report.sites("lora")
    assert any("used again" in miss.reason for miss in report.near_misses if miss.pattern == "lora")


def test_a_trained_layer_stays():
    report = written("between", trained=True)
    assert not report.sites("lora")
    assert any("weight is trained" in miss.reason for miss in report.near_misses if miss.pattern == "lora")
