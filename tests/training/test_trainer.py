"""Hugging Face's Trainer with an optimised model."""

import copy

import pytest
import torch
from training.common import relative
from training.models import batch, build
from transformers import Trainer, TrainingArguments

import rewriter


class Rows(torch.utils.data.Dataset):
    def __init__(self, count):
        rows = batch((count, 16))
        self.rows = [{k: v[i] for k, v in rows.items()} for i in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def run(model, folder, **options):
    accuracies = []

    def accuracy(prediction):
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        accuracies.append(float((logits.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]).mean()))
        return {"accuracy": accuracies[-1]}

    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, per_device_eval_batch_size=4, use_cpu=True, seed=0,
        report_to=[], logging_steps=1, learning_rate=1e-3, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(6), eval_dataset=Rows(8), compute_metrics=accuracy)
    trainer.train()
    metrics = trainer.evaluate()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, metrics["eval_loss"], metrics["eval_accuracy"]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_three_steps_and_evaluation(tmp_path, options):
    model = build("Llama")
    eager = copy.deepcopy(model)
    new, old = run(rewriter.optimize(model), tmp_path / "new", **options), run(eager, tmp_path / "old", **options)
    tolerance = 1e-2 if options.get("bf16") else 1e-4
    assert len(new[0]) == 3
    torch.testing.assert_close(torch.tensor(new[0]), torch.tensor(old[0]), rtol=tolerance, atol=tolerance)
    assert abs(new[1] - old[1]) <= tolerance * old[1]
    assert options.get("bf16") or new[2] == old[2]
    worst = max(relative(p, q) for p, q in zip(model.parameters(), eager.parameters(), strict=True))
    assert worst <= (5e-2 if options.get("bf16") else 1e-3)
    assert len(rewriter.report(model).sites("rms_norm")) == 5
    assert len(rewriter.report(model).sites("linear_cross_entropy")) == 1
