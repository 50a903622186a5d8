"""Every built-in pattern with a fault: whatever a model has, nothing of it may be replaced, and it trains on."""

import torch

from rewriter import Call
from rewriter.library import built_in


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 1.05 * gradient


def _each(result, change):
    return tuple(map(change, result)) if isinstance(result, tuple | list) else change(result)


def raises(call):
    raise RuntimeError("planted")


def raises_when_called(call):
    def fn(*args, **kwargs):
        raise RuntimeError("planted")

    return fn


def wrong_numbers(call):
    return lambda *args, **kwargs: _each(call.fn(*args, **kwargs), lambda x: x * 1.05)


def wrong_backward(call):
    def fn(*args, **kwargs):
        return _each(call.fn(*args, **kwargs), lambda x: _WrongBackward.apply(x) if x.requires_grad else x * 1.05)

    return fn


def nothing_is_a_number(call):
    return lambda *args, **kwargs: _each(call.fn(*args, **kwargs), lambda x: x * float("nan"))


def draws(call):
    def fn(*args, **kwargs):
        torch.rand(1)
        return call.fn(*args, **kwargs)

    return fn


FAULTS = (raises, raises_when_called, wrong_numbers, wrong_backward, nothing_is_a_number, draws)


def broken(fault):
    """Instances of all built-in patterns whose replacements have this fault."""

    def with_fault(pattern):
        def replacement(self, *matches):
            call = type(pattern).replacement(self, *matches)
            return Call(fault(call), call.args, call.kwargs, call.note)

        return type(f"Broken{type(pattern).__name__}", (type(pattern),), {"replacement": replacement})()

    return [with_fault(pattern) for pattern in built_in().values()]
