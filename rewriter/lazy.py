"""A tensor that a model returns but its loss didn't need: shape, dtype and device are there, values come on demand.

Metadata and copies of it (`detach`, `float`, `to(dtype)`) cost nothing. Logits are read row by row where that will do
(lazy_rows.py). Anything else computes it once, with the graph that the model had, so a gradient through it is exact. It
stays what it was when an optimizer changes the weights: then it keeps a copy of those it needs. Another change in place
of what it is computed from is an error when it is read.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from rewriter.lazy_rows import Rows, Sources, read

_METADATA = {
    torch.Tensor.shape.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__,
    torch.Tensor.layout.__get__,
    torch.Tensor.ndim.__get__,
    torch.Tensor.is_cuda.__get__,
    torch.Tensor.is_leaf.__get__,
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.__len__,
    torch.is_floating_point,
    torch.is_tensor,
    torch.numel,
}
_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__
# These look at, or hook into, a gradient that was never computed: the loss did not go through this tensor.
_GRADIENT = {torch.Tensor.retain_grad, torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook}


class LazyTensor(torch.Tensor):
    """Computes itself with `compute(sources)` at the first use of its values."""

    @staticmethod
    def __new__(
        cls,
        compute: Callable[[list[torch.Tensor]], torch.Tensor],
        sources: Sources,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        needs_grad: bool,
        rows: Rows | None = None,
    ) -> LazyTensor:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)
        self._compute, self._sources, self._value, self._needs_grad = compute, sources, None, needs_grad
        self._rows = rows
        _remember(self)
        return self

    def materialize(self) -> torch.Tensor:
        """The plain tensor; computed at the first call."""
        if self._value is None:
            self._value = self._compute(self._sources.checked())
            self._compute = self._sources = self._rows = None
        return self._value

    @classmethod
    @torch.compiler.disable  # Dynamo meets it behind a graph break, and loses its way in here
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self = args[0] if args else None
        if isinstance(self, LazyTensor):
            if func in _METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func is _REQUIRES_GRAD:
                return self._needs_grad
            if func in _GRADIENT:
                raise RuntimeError(
                    f"{func.__name__} on a result that the loss was not computed from: the head and the loss were "
                    "fused. Use rewriter.optimize(model, exclude=('linear_cross_entropy',)) to keep them apart."
                )
            result = _by_rows(self, func, args[1:], kwargs)
            if result is NotImplemented:
                result = _follower(self, func, args[1:], kwargs)
            if result is not NotImplemented:
                return result
        return func(*_materialized(args), **_materialized(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*_materialized(args), **_materialized(kwargs or {}))


def lazy_rows(rows: Rows) -> LazyTensor:
    """The tensor that `rows` describes."""

    def compute(_: list[torch.Tensor]) -> torch.Tensor:
        return rows.whole()

    return LazyTensor(compute, rows.sources, rows.shape, rows.dtype, rows.device, rows.needs_grad, rows)


def _materialized(tree: Any) -> Any:
    return pytree.tree_map(lambda t: t.materialize() if isinstance(t, LazyTensor) else t, tree)


def _by_rows(source: LazyTensor, func: Callable, args: tuple, kwargs: dict) -> Any:
    """`func(source)` by a way that never has all of it, or NotImplemented."""
    if source._rows is None:
        return NotImplemented

    def rows_of(value: Any) -> Any:
        return value._rows or value.materialize() if isinstance(value, LazyTensor) else value

    result = read(source._rows, func, pytree.tree_map(rows_of, args), pytree.tree_map(rows_of, kwargs))
    return lazy_rows(result) if isinstance(result, Rows) else result


def _follower(source: LazyTensor, func: Callable, args: tuple, kwargs: dict) -> Any:
    """A lazy tensor for `func(source)` where func only changes dtype or detaches, or NotImplemented."""
    if source._value is not None or kwargs:
        return NotImplemented
    dtype, needs_grad = source.dtype, source._needs_grad
    casts = {torch.Tensor.float: torch.float32, torch.Tensor.double: torch.float64, torch.Tensor.half: torch.float16,
             torch.Tensor.bfloat16: torch.bfloat16}  # fmt: skip
    if func in casts and not args:
        dtype = casts[func]
    elif func is torch.Tensor.to and len(args) == 1 and isinstance(args[0], torch.dtype):
        dtype = args[0]
    elif func is torch.Tensor.detach and not args:
        needs_grad = False
    else:
        return NotImplemented
    needs_grad = needs_grad and torch.is_grad_enabled()

    def compute(_: list[torch.Tensor]) -> torch.Tensor:
        return func(source.materialize(), *args)

    return LazyTensor(compute, Sources([]), tuple(source.shape), dtype, source.device, needs_grad)


_pending: dict[int, weakref.ref[LazyTensor]] = {}


def _remember(tensor: LazyTensor) -> None:
    """Keep track of it until it dies: an optimizer's step must not change what it will be computed from."""
    if not _pending:
        _watch_optimizers()
    key = id(tensor)
    _pending[key] = weakref.ref(tensor, lambda _: _pending.pop(key, None))


@functools.cache
def _watch_optimizers() -> None:
    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        waiting = [t for ref in list(_pending.values()) if (t := ref()) is not None and t._sources is not None]
        if waiting:
            parameters = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
            for tensor in waiting:
                tensor._sources.keep_from(parameters)

    register_optimizer_step_pre_hook(before_step)
