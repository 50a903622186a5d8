"""Logits that the loss didn't need are still the model's own, whenever and however they are read."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from training.common import TOLERANCE, assert_same_gradients, assert_trains_alike, relative, step
from training.models import batch, batches, build

import rewriter

BATCH = batch((2, 16))


@pytest.fixture
def pair():
    model = build("Llama", use_cache=False)
    eager = copy.deepcopy(model)
    return rewriter.optimize(model), eager


READS = [
    lambda t: t.argmax(-1),
    lambda t: t.detach().cpu().numpy(),
    lambda t: t.tolist(),
    lambda t: t.float().log_softmax(-1),
    lambda t: torch.cat([t, t]),
    lambda t: t[..., :-1, :].contiguous().view(-1, t.size(-1)),
    lambda t: t[BATCH["labels"] != -100],
    lambda t: list(t),
    lambda t: t.data.sum(),
    lambda t: t.max(-1).values,
    lambda t: np.asarray(t.detach()),
    lambda t: t.detach().clone().mul_(2),
    lambda t: t.to("cpu", non_blocking=True).half(),
    lambda t: f"{t.mean():.4f}",
    lambda t: copy.deepcopy(t.detach()),
    lambda t: torch.zeros_like(t),
    lambda t: F.cross_entropy(t.flatten(0, 1), BATCH["labels"].flatten()),
]


def test_every_way_to_read(pair):
    new, old = (m(**BATCH).logits for m in pair)
    assert (new.shape, new.dtype, new.device, new.requires_grad) == (
        old.shape,
        old.dtype,
        old.device,
        old.requires_grad,
    )
    assert new.stride() == old.stride() and isinstance(new, torch.Tensor)
    for read in READS:
        for a, b in zip(*(r if isinstance(r := read(t), list | tuple) else [r] for t in (new, old)), strict=True):
            if isinstance(b, str):
                assert a == b
            else:
                np.testing.assert_allclose(_array(a), _array(b), rtol=1e-3, atol=1e-5)


def _array(value):
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def test_written_in_place(pair):
    results = []
    for m in pair:
        logits = m(**BATCH).logits
        logits.div_(2.0)
        logits[0] = 0
        results.append(logits.detach() + 0)
    assert relative(*results) <= TOLERANCE


@pytest.mark.parametrize("with_loss", [True, False])
def test_gradient_through_logits(pair, with_loss):
    for m in pair:
        outputs = m(**BATCH)
        distance = outputs.logits.log_softmax(-1).square().mean()
        (outputs.loss + distance if with_loss else distance).backward()
    assert_same_gradients(*pair)


def test_second_backward_through_logits(pair):
    for m in pair:
        outputs = m(**BATCH)
        outputs.loss.backward(retain_graph=True)
        outputs.logits.square().mean().backward()
    assert_same_gradients(*pair)


def test_read_after_the_optimizer_step(pair):
    """An accuracy is often computed at the end of the loop's body: it is that of the weights the loss was made with."""
    logits = []
    for m in pair:
        optimizer = torch.optim.SGD(m.parameters(), lr=0.5)
        outputs = step(m, BATCH)
        optimizer.step()
        logits.append(outputs.logits.detach() + 0)
    assert relative(*logits) <= TOLERANCE


def test_loop_with_accuracy():
    model, eager, _ = assert_trains_alike(build("Qwen2", use_cache=False), batches()[:1])
    accuracies = []
    for m in (model, eager):
        outputs = step(m, BATCH)
        accuracies.append((outputs.logits.argmax(-1)[:, :-1] == BATCH["labels"][:, 1:]).float().mean())
    assert torch.equal(*accuracies)


def test_labels_all_ignored(pair):
    ids = BATCH["input_ids"]
    losses = []
    for m in pair:
        loss = m(input_ids=ids, labels=torch.full_like(ids, -100)).loss
        loss.backward()
        losses.append(loss)
    assert torch.equal(losses[0].isnan(), losses[1].isnan())
    for new, old in zip(*(m.parameters() for m in pair), strict=True):
        torch.testing.assert_close(new.grad, old.grad, equal_nan=True, rtol=1e-4, atol=1e-6)


def test_label_out_of_range_is_still_an_error(pair):
    labels = BATCH["input_ids"].clone()
    labels[0, 3] = 10_000
    for m in pair:
        with pytest.raises((IndexError, RuntimeError)):
            m(input_ids=BATCH["input_ids"], labels=labels).loss.backward()


def test_number_of_items_in_batch(pair):
    for m in pair:
        m(**BATCH, num_items_in_batch=torch.tensor(57)).loss.backward()
    assert_same_gradients(*pair)
    assert rewriter.report(pair[0]).sites("linear_cross_entropy")


@pytest.mark.parametrize("teacher_too", [False, True])
def test_distillation_loop(pair, teacher_too):
    """Three steps of a loop that compares the logits of a student and a teacher."""
    teacher = build("Llama", seed=3, use_cache=False).eval()
    histories = []
    for m, optimised in zip(pair, (True, False), strict=True):
        master = copy.deepcopy(teacher)
        master = rewriter.optimize(master) if optimised and teacher_too else master
        optimizer, losses = torch.optim.SGD(m.parameters(), lr=0.1), []
        for inputs in batches():
            outputs = m(**inputs)
            with torch.no_grad():
                wanted = master(**inputs).logits
            kept = inputs["labels"] != -100
            student, wanted = (F.log_softmax(z.float()[kept] / 2.0, -1) for z in (outputs.logits, wanted))
            distance = F.kl_div(student, wanted, log_target=True, reduction="batchmean") * 4.0
            loss = 0.5 * outputs.loss + 0.5 * distance
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += [loss.detach(), distance.detach()]
        histories.append(torch.stack(losses))
    torch.testing.assert_close(*histories, rtol=1e-5, atol=1e-6)
    assert max(relative(p, q) for p, q in zip(*(m.parameters() for m in pair), strict=True)) <= TOLERANCE


def test_accuracy_in_evaluation(pair):
    """An evaluation loop with its sums on the side, between steps of training."""
    histories = []
    for m in pair:
        optimizer, numbers = torch.optim.SGD(m.parameters(), lr=0.1), []
        for inputs in batches():
            m.train()
            m(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            m.eval()
            with torch.no_grad():
                outputs = m(**inputs)
            right = (outputs.logits.argmax(-1)[:, :-1] == inputs["labels"][:, 1:]).sum()
            numbers.append(torch.stack([outputs.loss, outputs.loss.exp(), right]))
        histories.append(torch.stack(numbers))
    torch.testing.assert_close(*histories, rtol=1e-5, atol=1e-6)


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


GATHERS = {
    "gather": lambda a, z: a.gather(z),
    "gather for metrics": lambda a, z: a.gather_for_metrics((z, z.argmax(-1)))[0],
    "pad across processes": lambda a, z: a.pad_across_processes(z, dim=1, pad_index=-100),
    "padded and gathered": lambda a, z: a.gather_for_metrics(a.pad_across_processes(z.detach(), dim=1)),
    "reduce": lambda a, z: a.reduce(z, reduction="mean"),
    "to numpy": lambda a, z: torch.as_tensor(a.gather(z).detach().float().cpu().numpy()),
}


@pytest.mark.parametrize("name", GATHERS)
def test_accelerate_gathers(pair, accelerator, name):
    results = [GATHERS[name](accelerator, accelerator.prepare(m)(**BATCH).logits) for m in pair]
    assert results[0].shape == results[1].shape and results[0].dtype == results[1].dtype
    assert relative(*(r.detach() + 0 for r in results)) <= TOLERANCE


def test_accelerate_loop_with_mixed_precision(pair):
    """Outputs come back in float32; the loss goes through accelerator.backward."""
    accelerate = pytest.importorskip("accelerate")
    histories = []
    for m in pair:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        try:
            m, optimizer = accelerator.prepare(m, torch.optim.SGD(m.parameters(), lr=0.1))
            losses = []
            for inputs in batches():
                with accelerator.accumulate(m):
                    outputs = m(**inputs)
                    assert outputs.loss.dtype is outputs.logits.dtype is torch.float32
                    accelerator.backward(outputs.loss)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(outputs.loss.detach())
                losses.append(outputs.logits.detach().logsumexp(-1).mean())
            histories.append(torch.stack(losses))
        finally:
            accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.testing.assert_close(*histories, rtol=2e-2, atol=2e-2)
