"""The comparison forgives what rounding does to a gradient, and nothing else."""

import pytest
import torch
from training.common import assert_same_training
from zoo.alike import settled


def history(**gradients):
    return [(torch.ones(()), {name: torch.tensor(value) for name, value in gradients.items()})]


OLD = history(firm=[1.0, 2.0], loose=[1.0, 2.0])
NOISY = [history(firm=[1.0, 2.0], loose=[1.0, 2.0001]), history(firm=[1.0, 2.0], loose=[1.0, 2.0])]


def compare(**gradients):
    assert_same_training(settled(history(**gradients), OLD, NOISY), OLD)


def test_a_gradient_that_noise_changes_may_differ_as_much():
    compare(firm=[1.0, 2.0], loose=[1.0005, 2.0])


@pytest.mark.parametrize(
    "wrong",
    [
        dict(firm=[1.0, 2.0001], loose=[1.0, 2.0]),
        dict(firm=[1.0, 2.0], loose=[1.0, 2.01]),
        dict(firm=[1.0, 2.0], loose=[1.0, float("nan")]),
        dict(firm=[1.0, 2.0], loose=[1.0, 2.0, 3.0]),
    ],
)
def test_everything_else_is_a_failure(wrong):
    with pytest.raises(AssertionError):
        compare(**wrong)


def test_hopeless_noise_does_not_excuse_anything():
    noisy = [history(firm=[5.0, 2.0], loose=[-1.0, 2.0])]
    with pytest.raises(AssertionError):
        assert_same_training(settled(history(firm=[1.2, 2.0], loose=[1.0, 2.0]), OLD, noisy), OLD)
