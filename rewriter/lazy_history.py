"""How a result on demand takes part in autograd where Python doesn't see it: `Function.apply`, wrappers, the engine.

A tensor subclass is asked before PyTorch's operators run, so most of its uses never reach autograd as they are. Those
that do, in C++, find a history here that is exact: `History` computes the result anew in backward, from what it is made
of. Once it was computed, `Joined` leads to the history that its values have by then, hooks and writes included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function

_GRAD_FN = torch.Tensor.grad_fn.__get__
_PLACE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


class History(Function):
    """make() as a function of the sources. inputs: gives their values in backward; again: computes it of them."""

    @staticmethod
    def forward(ctx: Any, make: Callable, inputs: Callable, again: Callable, *sources: Any) -> torch.Tensor:
        ctx.inputs, ctx.again = inputs, again
        ctx.set_materialize_grads(False)
        return make()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple:
        needed = ctx.needs_input_grad[3:]
        if grad is None:
            return (None,) * (3 + len(needed))
        with torch.enable_grad():
            sources = [s.view_as(s) if need else s for s, need in zip(ctx.inputs(), needed, strict=True)]
            value = ctx.again(sources)
        wanted = [s for s, need in zip(sources, needed, strict=True) if need]
        found = torch.autograd.grad(value, wanted, grad, allow_unused=True, create_graph=torch.is_grad_enabled())
        gradients = iter(found)
        return (None, None, None, *(next(gradients) if need else None for need in needed))


class Joined(Function):
    """From now on, the gradient of the first tensor is that of the second, which has its values."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(tensor)
        ctx.set_materialize_grads(False)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple:
        return None, grad


def node_of(tensor: torch.Tensor) -> Any:
    """The history that C++ knows."""
    with torch._C.DisableTorchFunctionSubclass():
        return _GRAD_FN(tensor)


def join(tensor: torch.Tensor, value: torch.Tensor) -> Any:
    """Give `tensor` the history of `value`; gives back the node by which C++ knows it."""
    same_values = torch.autograd._unsafe_preserve_version_counter
    with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass(), same_values(tensor):
        Joined.apply(tensor, value)
    return node_of(tensor)


def outside() -> Any:
    """A context in which Python code that an operator calls has autograd and autocast, as if nothing called it."""
    return torch._C._ForceDispatchKeyGuard(*_PLACE)
