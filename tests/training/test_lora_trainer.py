"""A fine-tuning script as users write it: Trainer and PEFT, saved, and loaded again by PEFT alone."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from training.common import relative
from training.models import batch, build
from transformers import Trainer, TrainingArguments

import rewriter


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
    losses = run(rewriter.optimize(model), tmp_path / "new", **options)
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
