"""Three training steps of each architecture beside a copy that was never optimised: loss, gradients, sites."""

from functools import partial

import pytest
import torch
from training.common import assert_trains_alike, near_truth
from training.models import LAYERS, NAMES, batch, batches, build, norms_that_ran, with_lora

import rewriter

autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def assert_everything_found(report, norms, layers=LAYERS):
    assert sorted(report.sites("rms_norm")) == norms
    assert len(report.sites("rotary")) == len(report.sites("glu")) == layers
    assert len(report.sites("linear_cross_entropy")) == 1
    assert not report.fallbacks
    assert not report.graph_breaks
    # PyTorch has no fused attention with capped scores: the one thing that may be seen and not done
    missed = {miss.pattern: miss.reason for miss in report.near_misses}
    assert missed in ({}, {"attention": "expected matmul, found tanh"}), report.near_misses


@pytest.mark.parametrize("name", NAMES)
def test_full(name):
    model = build(name)
    norms = norms_that_ran(model)
    assert len(norms) > 2 * LAYERS
    _, _, report = assert_trains_alike(model, batches())
    assert_everything_found(report, norms)


def test_adamw():
    assert_trains_alike(build("Llama", use_cache=False), batches()[:1], optimizer=torch.optim.AdamW)


@pytest.mark.parametrize("name, dropout, steps", [*((name, 0.1, 1) for name in NAMES), ("Qwen3", 0.0, 3)])
def test_lora(name, dropout, steps):
    model = with_lora(build(name, use_cache=False), dropout)
    norms = norms_that_ran(model)
    model, _, report = assert_trains_alike(model, batches()[:steps])
    assert_everything_found(report, norms)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in n for n in trained) and trained


@pytest.mark.parametrize(
    "name, reentrant, steps", [*((name, False, 1) for name in NAMES), ("Qwen2", False, 3), ("Gemma2", True, 3)]
)
def test_checkpointing(name, reentrant, steps):
    model = build(name)
    norms = norms_that_ran(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    _, _, report = assert_trains_alike(model, batches()[:steps])
    assert_everything_found(report, norms)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_lora_and_dropout(reentrant):
    model = with_lora(build("Qwen2", use_cache=False), 0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_trains_alike(model, batches())


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Qwen3", "Glm4"])
def test_bf16_autocast(name):
    model = build(name, use_cache=False)
    norms = norms_that_ran(model)
    model = near_truth(model, batches()[:1], autocast, floor=2e-3)
    assert_everything_found(rewriter.report(model), norms)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_bf16_weights(name):
    model = build(name, use_cache=False).bfloat16()
    norms = norms_that_ran(model.float())
    model = near_truth(model.bfloat16(), batches()[:2], context=torch.enable_grad, floor=2e-3)
    assert_everything_found(rewriter.report(model), norms)


def test_28_blocks_share_one_graph():
    model = rewriter.optimize(build("Qwen2", layers=28))
    model(**batch((2, 16))).loss.backward()
    report = rewriter.report(model)
    counts = [len(report.sites(p)) for p in ("rms_norm", "rotary", "glu", "linear_cross_entropy")]
    assert counts == [57, 28, 28, 1]
    assert report.graphs <= 4, report.regions


def test_a_new_length_costs_one_recompile():
    model = rewriter.optimize(build("Llama", use_cache=False, layers=3))
    for tokens in (16, 24, 20, 33, 8, 77):
        model(**batch((2, tokens))).loss.backward()
    assert rewriter.report(model).graphs <= 2 * 3, rewriter.report(model).regions


def test_inductor_trains_the_same():
    assert_trains_alike(build("Llama", use_cache=False, layers=1), batches()[:1], options={"executor": "inductor"})
