"""Train a model and its never-optimised copy alike, and compare losses and every gradient."""

import copy
from contextlib import nullcontext

import torch

import rewriter

TOLERANCE = 1e-5  # relative, in the 2-norm of each tensor


def loss_of(outputs):
    if isinstance(outputs, torch.Tensor):
        return outputs
    return outputs["loss"] if isinstance(outputs, dict) else outputs[-1]


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def train(model, steps, *, optimizer=torch.optim.SGD, learning_rate=0.05, context=nullcontext, loss_of=loss_of):
    """One optimizer step for each batch, from equal random state; [(loss, gradients by name)].

    SGD, since the first step of Adam is the sign of the gradient: it makes whole steps of the last bits of small ones.
    """
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(wanted, lr=learning_rate)
    history = []
    for number, inputs in enumerate(steps):
        torch.manual_seed(100 + number)
        with context():
            loss = loss_of(model(**inputs) if isinstance(inputs, dict) else model(*inputs))
        loss.backward()
        history.append((loss.detach().clone(), gradients(model)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return history


def relative(new, old):
    return ((new.double() - old.double()).norm() / old.double().norm().clamp(min=1e-30)).item()


def assert_same_training(new, old, tolerance=TOLERANCE):
    """Losses and gradients of two histories; a gradient is missing in both or in neither."""
    for step, ((new_loss, new_grads), (old_loss, old_grads)) in enumerate(zip(new, old, strict=True)):
        assert new_loss.dtype == old_loss.dtype and new_loss.shape == old_loss.shape
        assert relative(new_loss, old_loss) <= tolerance, f"step {step}: loss {new_loss}, eager {old_loss}"
        assert new_grads.keys() == old_grads.keys()
        worst = {}
        for name, old_grad in old_grads.items():
            new_grad = new_grads[name]
            assert (new_grad is None) == (old_grad is None), f"step {step}: {name} has a gradient in one run only"
            if old_grad is None:
                continue
            assert new_grad.dtype == old_grad.dtype and new_grad.shape == old_grad.shape, name
            if old_grad.norm() > 1e-7:  # a gradient that is zero but for rounding has no direction to compare
                worst[name] = relative(new_grad, old_grad)
            else:
                assert new_grad.norm() < 1e-6, f"step {step}: {name} is {new_grad.norm()}, eager has no gradient"
        bad = {n: e for n, e in worst.items() if not e <= tolerance}
        assert not bad, f"step {step}: relative errors of gradients {bad}"
        assert worst, "no gradient was compared"


def assert_trains_alike(model, steps, tolerance=TOLERANCE, options=None, **settings):
    """Optimise `model`, train it beside an eager copy of itself; gives back (model, eager copy, report)."""
    eager = copy.deepcopy(model)
    old = train(eager, steps, **settings)
    assert all(torch.isfinite(loss).all() for loss, _ in old), "the test's own loss is not finite"
    model = rewriter.optimize(model, **(options or {}))
    new = train(model, steps, **settings)
    assert_same_training(new, old, tolerance)
    return model, eager, rewriter.report(model)


def near_truth(model, steps, context, floor, exact=None, options=None):
    """The float64 rule for one step: |new - truth| <= 2 |old - truth| + floor |truth| for loss and every gradient.

    exact: the model in float64, where `double()` doesn't make that
    """
    exact = copy.deepcopy(model).double() if exact is None else exact
    eager = copy.deepcopy(model)
    optimised = rewriter.optimize(model, **(options or {}))
    for step in steps:
        rows = [train(m, [step], learning_rate=0.0, context=c)[0]
                for m, c in ((optimised, context), (eager, context), (exact, nullcontext))]  # fmt: skip
        (new_loss, new_grads), (old_loss, old_grads), (true_loss, true_grads) = rows
        _near("loss", new_loss, old_loss, true_loss, floor)
        assert new_grads.keys() == true_grads.keys()
        for name, truth in true_grads.items():
            assert (new_grads[name] is None) == (old_grads[name] is None), name
            if truth is not None:
                _near(name, new_grads[name], old_grads[name], truth, floor)
    return optimised


def _near(name, new, old, truth, floor):
    assert new.dtype == old.dtype, name
    new_error, old_error = (t.double() - truth for t in (new, old))
    allowed = 2 * old_error.norm() + floor * truth.norm()
    assert new_error.norm() <= allowed, f"{name}: error {new_error.norm():.2e}, eager has {old_error.norm():.2e}"


def step(model, batch):
    """One forward with random state 0 and its backward; gives back the outputs."""
    torch.manual_seed(0)
    outputs = model(**batch)
    outputs.loss.backward()
    return outputs


def assert_same_gradients(new, old, tolerance=TOLERANCE):
    """Of two models, after each had its backward."""
    row = [(torch.ones(()), gradients(m)) for m in (new, old)]
    assert_same_training([row[0]], [row[1]], tolerance)
