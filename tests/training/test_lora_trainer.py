"""A fine-tuning script as users write it: Trainer and PEFT, saved, and loaded again by PEFT alone."""

import copy

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from training.common import assert_trains_alike, relative
from training.models import batch, build
from transformers import Trainer, TrainingArguments

import rewriter

LONG = [batch((2, 16)), batch((2, 24), 1)]


def base():
    return build("Llama", layers=2, use_cache=False)


def adapted(model):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def rows(count):
    whole = batch((count, 16))
    return [{k: v[i] for k, v in whole.items()} for i in range(count)]


def run(model, folder, **options):
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True, seed=0,
        report_to=[], logging_steps=1, learning_rate=1e-2, save_steps=3, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows(12))
    trainer.train()
    return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, {"bf16": True}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_trained_saved_and_loaded(tmp_path, options):
    model = adapted(base())
    eager = copy.deepcopy(model)
    losses = run(rewriter.optimize(model, patterns=["lora"]), tmp_path / "new", **options)
    before = run(eager, tmp_path / "old", **options)
    tolerance = 1e-2 if "bf16" in options else 1e-4
    assert len(losses) == 3
    torch.testing.assert_close(losses, before, rtol=tolerance, atol=tolerance)
    report = rewriter.report(model)
    assert len(report.sites("lora")) == 14 and not report.fallbacks

    loaded = PeftModel.from_pretrained(base(), tmp_path / "new" / "checkpoint-3").eval()
    with torch.no_grad():
        logits = [m.eval()(**batch((2, 16), 5)).logits for m in (loaded, model)]
    assert relative(*logits) <= (2e-2 if "bf16" in options else 1e-5)  # the Trainer's autocast stays on its model
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in loaded.named_parameters())
    moved = [n for n, p in model.named_parameters() if "lora_B" in n and p.abs().max() > 1e-4]
    assert len(moved) == 14


def test_over_weights_in_four_bits():
    """Whatever of it is fused, it trains as it does without."""
    model = base()
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, torch.nn.Linear):
                    setattr(parent, name, in_four_bits(layer))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    *_, report = assert_trains_alike(adapted(model).train(), LONG, options={"patterns": ["lora"]})
    assert report.sites("rms_norm") and not report.fallbacks


def in_four_bits(layer):
    packed = bitsandbytes.nn.Linear4bit(*layer.weight.shape[::-1], bias=False, compute_dtype=torch.float32)
    weight = layer.weight.detach().clone()
    packed.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return packed.to("cpu")
