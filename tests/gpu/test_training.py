"""Whole models on a GPU, by both executors: loss and every gradient as near to float64 truth as eager's."""

import copy

import peft
import pytest
import torch
import transformers
from numerics import FLOOR

import rewriter

SIZES = dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=1000, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {"Qwen2": {}, "Gemma2": {"head_dim": 64}, "Phi3": {}, "Qwen3": {"head_dim": 64}}


def build(name, dtype, adapters=False):
    config = getattr(transformers, f"{name}Config")(**SIZES, **CONFIGS[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if adapters:
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    return model.to("cuda", dtype).train()


def step(model, ids):
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return {"loss": output.loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("executor", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, adapters", [*((name, False) for name in CONFIGS), ("Qwen2", True), ("Gemma2", True)])
def test_trains_as_near_to_the_truth_as_eager(name, adapters, dtype, executor):
    eager = build(name, dtype, adapters)
    model, exact = copy.deepcopy(eager), copy.deepcopy(eager).double()
    rewriter.optimize(model, executor=executor)
    for length in (64, 100):
        ids = torch.randint(3, 1000, (2, length), device="cuda", generator=torch.Generator("cuda").manual_seed(length))
        new, old, truth = (step(m, ids) for m in (model, eager, exact))
        for key, true in truth.items():
            size, floor = true.norm(), 2 * FLOOR[dtype]
            errors = [(given[key].double() - true).norm() / size for given in (new, old)]
            assert errors[0] <= 2 * errors[1] + floor, (key, length, errors)
    report = rewriter.report(model)
    expected = {*(["lora"] if adapters else []), "rms_norm", "rotary", "glu", "linear_cross_entropy", "attention"}
    assert expected <= {name for name, (done, _) in report.coverage().items() if done}
    assert not report.near_misses and not report.fallbacks
