"""The pattern `lora`: adapters of PEFT and hand-written ones train as in eager, dropout's random numbers included."""

import contextlib
import functools

import pytest
import torch
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
    report = rewriter.report(model)
    assert report.coverage()["lora"] == (14, 14)
    together = {r.details["layers"] for r in report.rewrites if r.pattern == "lora"}
    assert together == {3, 2, 1}  # layers that share their input are one call
    assert set(report.sites("lora")) == {n for n, m in model.named_modules() if hasattr(m, "lora_A")}


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
    assert rewriter.report(model).coverage()["lora"][0] == 14


def test_weight_decomposed_ones_stay_and_train():
    model = with_lora(build("Llama", layers=1, use_cache=False), use_dora=True)
    *_, report = assert_trains_alike(model, STEPS[:1], options=LORA)
    assert not report.sites("lora")
    assert any("weight-decomposed" in miss.reason for miss in report.near_misses if miss.pattern == "lora")
