"""Adapters: switching them off and on, adding, saving, merging."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from training.common import TOLERANCE, assert_same_gradients, relative, step
from training.models import batch, build, with_lora

import rewriter

BATCH, OTHER = batch((2, 16)), batch((3, 24), 1)


@pytest.fixture
def pair():
    model = with_lora(build("Llama", use_cache=False))
    eager = copy.deepcopy(model)
    rewriter.optimize(model)
    for m in (model, eager):
        step(m, BATCH)
        m.zero_grad()
    return model, eager


def assert_trains_like(new, old):
    for m in (new, old):
        m.zero_grad()
        step(m, BATCH)
    assert_same_gradients(new, old)


def randomise(model, name):
    torch.manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.normal_(0, 0.1)


def test_disable_adapter(pair):
    model, eager = pair
    for inputs in (BATCH, OTHER):
        results = []
        for m in pair:
            with m.disable_adapter():
                results.append(m(**inputs).loss)
            results.append(m(**inputs).loss)
        assert relative(results[0], results[2]) <= TOLERANCE and relative(results[1], results[3]) <= TOLERANCE
        assert relative(results[0], results[1]) > 1e-3, "the adapter makes no difference"
    assert_trains_like(model, eager)


def test_second_adapter(pair):
    model, eager = pair
    for m in pair:
        m.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
        randomise(m, "second")
        m.set_adapter("second")
    assert_trains_like(model, eager)
    for m in pair:
        m.set_adapter("default")
    assert_trains_like(model, eager)
    assert len(rewriter.report(model).sites("rms_norm")) == 5


def test_saved_and_loaded(pair, tmp_path):
    model, eager = pair
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("Llama", use_cache=False), tmp_path, is_trainable=True).train()
    assert_trains_like(loaded, eager)


def test_generate(pair):
    for m in pair:
        m.eval()
    assert torch.equal(*(m.generate(input_ids=BATCH["input_ids"], max_new_tokens=6, do_sample=False) for m in pair))


def test_merged(pair):
    merged = [m.merge_and_unload().train() for m in pair]
    for m in merged:
        m.requires_grad_(True)
    assert_trains_like(*merged)
    with torch.no_grad():
        assert relative(merged[0](**OTHER).loss, merged[1](**OTHER).loss) <= TOLERANCE
    assert not [m for m in rewriter.restore(merged[0]).modules() if "forward" in m.__dict__]
    assert_trains_like(*merged)


def test_adapter_around_an_optimised_model():
    model = rewriter.optimize(build("Qwen2", use_cache=False))
    step(model, BATCH)
    model.zero_grad()
    model, eager = with_lora(model), with_lora(build("Qwen2", use_cache=False))
    assert_trains_like(model, eager)
    assert len(rewriter.report(model).sites("rms_norm")) == 5


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head", "embed_tokens"]}], ids=str)
def test_other_kinds(options):
    model = with_lora(build("Llama", use_cache=False), **options)
    eager = copy.deepcopy(model)
    assert_trains_like(rewriter.optimize(model), eager)
    assert rewriter.report(model).sites("rms_norm")


def test_adapter_on_the_head():
    """It is fused with the loss: logits are there, and every gradient is eager's."""
    model = build("Llama", use_cache=False)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    randomise(model, "default")
    eager = copy.deepcopy(model)
    rewriter.optimize(model)
    assert_trains_like(model, eager)
    assert rewriter.report(model).sites("linear_cross_entropy") and not rewriter.report(model).sites("cross_entropy")
    logits = [m(**BATCH).logits for m in (model, eager)]
    assert relative(*logits) <= TOLERANCE
