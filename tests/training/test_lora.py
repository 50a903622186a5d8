"""The pattern `lora`: adapters of PEFT and hand-written ones train as in eager, dropout's random numbers included."""

import contextlib
import functools

import peft
import pytest
import torch
import transformers
from training.common import assert_trains_alike, near_truth
from training.models import batch, build, with_lora

import rewriter

LENGTHS = [batch((2, 16)), batch((3, 24), 1)]
STEPS = LENGTHS[:1]


@pytest.mark.parametrize(
    "kind, options",
    [
        ("Llama", {}),
        ("Qwen2", {"use_rslora": True}),
        ("Qwen2", {"bias": "lora_only"}),
        ("Llama", {"rank_pattern": {"k_proj": 3, "up_proj": 17}}),
    ],
    ids=str,
)
def test_peft(kind, options):
    """By the float64 rule: with a scale of 5.7 the small gradients of keys are what is left of a cancellation."""
    model = near_truth(with_lora(build(kind, use_cache=False), **options), STEPS, contextlib.nullcontext, 2e-6)
    report = rewriter.report(model)
    assert report.coverage()["lora"] == (14, 14)
    together = {r.details["layers"] for r in report.rewrites if r.pattern == "lora"}
    assert together == {3, 2, 1}  # layers that share their input are one call
    assert set(report.sites("lora")) == {n for n, m in model.named_modules() if hasattr(m, "lora_A")}


def test_dropout():
    *_, report = assert_trains_alike(with_lora(build("Llama", use_cache=False), dropout=0.1), LENGTHS)
    assert report.coverage()["lora"] == (14, 14)  # each layer has a dropout of its own


def test_checkpointing():
    model = build("Llama", use_cache=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    *_, report = assert_trains_alike(with_lora(model, dropout=0.1), STEPS)
    assert report.sites("lora")


@pytest.mark.parametrize("context", [False, True], ids=["plain", "autocast"])
def test_float32_adapters_of_bfloat16_weights(context):
    model = with_lora(build("Llama", use_cache=False).bfloat16())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    context = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=context)
    model = near_truth(model, STEPS, context, 8e-3)
    assert rewriter.report(model).coverage()["lora"][0] == 14


KINDS = {
    "biases": (peft.LoraConfig(r=4, lora_bias=True), "Qwen2", 3, ""),
    "whole head": (peft.LoraConfig(r=4, modules_to_save=["lm_head"]), "Llama", 3, ""),
    "vectors": (peft.VeraConfig(r=4), "Llama", 2, ""),
    "adaptive ranks": (peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9), "Llama", 3, ""),
    "weight-decomposed": (peft.LoraConfig(r=4, use_dora=True, lora_dropout=0.1), "Llama", 0, "weight-decomposed"),
    "no matrices": (peft.IA3Config(feedforward_modules=["down_proj"]), "Llama", 0, "no matrices to add"),
    "embedding": (peft.LoraConfig(r=4), "Llama", 3, "one of an embedding"),
    "columns": (peft.LoraConfig(r=4, lora_dropout=0.1, fan_in_fan_out=True), "GPT2", 4, ""),
}
TARGETS = {  # "vectors" has matrices that are of one width for all layers
    "vectors": ["q_proj", "o_proj"],
    "weight-decomposed": ["q_proj"],  # its code breaks the graph at each layer
    "columns": ["c_attn", "c_proj", "c_fc"],
    "embedding": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_peft(kind):
    config, name, places, reason = KINDS[kind]
    config.target_modules = TARGETS.get(kind, ["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(gpt2() if name == "GPT2" else build(name, layers=1, use_cache=False), config)
    fill(model)
    *_, report = assert_trains_alike(model.train(), STEPS)
    reasons = [miss.reason for miss in report.near_misses if miss.pattern == "lora"]
    assert len(report.sites("lora")) == places
    assert any(reason in why for why in reasons) if reason else not reasons


def fill(model):
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name and "lm_head" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=1, n_head=4, n_positions=64, use_cache=False, loss_type="ForCausalLM",
        bos_token_id=1, eos_token_id=2, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)
