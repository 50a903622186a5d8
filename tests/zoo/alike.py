"""Training with and without `rewriter`, compared as closely as the model's own conditioning in float32 allows.

Some gradients nearly cancel: noise of one rounding on the parameters of the eager model changes them by more than the
tolerance. What such noise does to each gradient is measured, and a gradient may differ by ten times that much, but by
no more than LIMIT.
"""

import copy

import torch
from training.common import assert_same_training, relative, train

import rewriter

ROUNDING, DRAWS, MARGIN, LIMIT = 2.0**-23, 4, 10, 0.05  # of two draws both may do little to a single number


def shaken(model, seed):
    """A copy with relative noise of one rounding on every parameter that is trained."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + ROUNDING * torch.randn(parameter.shape, generator=generator))
    return model


def settled(new, old, noisy):
    """`new` with each gradient that is as near to `old` as the noise allows put to `old`: those have been compared."""

    def settle(step, name, gradient):
        truth, changed = old[step][1].get(name), [history[step][1].get(name) for history in noisy]
        if gradient is None or truth is None or gradient.shape != truth.shape or any(c is None for c in changed):
            return gradient
        allowed = min(LIMIT, MARGIN * max(relative(c, truth) for c in changed))
        return truth if gradient.dtype == truth.dtype and relative(gradient, truth) <= allowed else gradient

    return [
        (loss, {name: settle(step, name, gradient) for name, gradient in gradients.items()})
        for step, (loss, gradients) in enumerate(new)
    ]


def assert_alike(model, steps, options=None, **settings):
    """Train a copy of `model`, optimised with the options, beside eager copies; gives back the report."""
    noisy = [shaken(model, seed) for seed in range(DRAWS)]
    old, *noisy = (train(m, steps, **settings) for m in (copy.deepcopy(model), *noisy))
    assert all(torch.isfinite(loss) for loss, _ in old), "the test's own loss is not finite"
    optimised = rewriter.optimize(copy.deepcopy(model), **(options or {}))
    assert_same_training(settled(train(optimised, steps, **settings), old, noisy), old)
    return rewriter.report(optimised)
