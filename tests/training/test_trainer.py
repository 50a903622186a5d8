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


def outcome(model, folder, what, **options):
    """(losses, metrics, predictions) of a run with callbacks that look at logits."""
    seen = []

    def best(logits, labels):
        logits = logits[0] if isinstance(logits, tuple) else logits
        seen.append(logits.shape)
        return logits.argmax(-1)

    def accuracy(prediction):
        given = prediction.predictions
        given = given[0] if isinstance(given, tuple) else given
        given = given if given.ndim == 2 else given.argmax(-1)
        return {"accuracy": float((given[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=3, use_cpu=True, seed=0,
        report_to=[], logging_steps=1, learning_rate=1e-3, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=Rows(6), eval_dataset=Rows(8), compute_metrics=accuracy,
        preprocess_logits_for_metrics=best if what == "preprocess" else None,
    )  # fmt: skip
    if what != "before training":
        trainer.train()
    evaluated = trainer.evaluate()
    predicted = trainer.predict(Rows(7))
    assert bool(seen) == (what == "preprocess")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    numbers = [evaluated["eval_loss"], evaluated["eval_accuracy"], predicted.metrics["test_loss"]]
    predictions = predicted.predictions
    return losses + numbers, torch.as_tensor(predictions[0] if isinstance(predictions, tuple) else predictions)


CALLS = {
    "preprocess": {},
    "before training": {},
    "smoothed": {"label_smoothing_factor": 0.1},
    "evaluated while training": {"eval_strategy": "steps", "eval_steps": 1},
    "in parts": {"eval_accumulation_steps": 1},
    "evaluated in 16 bits": {"bf16": True, "bf16_full_eval": True},
}


@pytest.mark.parametrize("name", CALLS)
def test_evaluate_and_predict(tmp_path, name):
    model = build("Llama")
    eager = copy.deepcopy(model)
    new, old = (
        outcome(m, tmp_path / n, name, **CALLS[name]) for m, n in ((rewriter.optimize(model), "n"), (eager, "o"))
    )
    tolerance = 2e-2 if "16" in name else 1e-4
    torch.testing.assert_close(torch.tensor(new[0]), torch.tensor(old[0]), rtol=tolerance, atol=tolerance)
    assert new[1].shape == old[1].shape and new[1].dtype == old[1].dtype
    if new[1].is_floating_point():
        assert relative(new[1], old[1]) <= tolerance
    else:
        assert torch.equal(new[1], old[1])
