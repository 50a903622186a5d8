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
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from rewriter.lazy_history import History, join, node_of, outside
from rewriter.lazy_rows import READABLE, Rows, may_share, read
from rewriter.sources import Sources, version_of

_METADATA = {
    torch.Tensor.shape.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__,
    torch.Tensor.layout.__get__,
    torch.Tensor.ndim.__get__,
    torch.Tensor.is_cuda.__get__,
    torch.Tensor.size,
    torch.Tensor.stride,
    torch.Tensor.is_contiguous,
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
_REQUIRES_GRAD, _IS_LEAF = torch.Tensor.requires_grad.__get__, torch.Tensor.is_leaf.__get__
_WRITTEN = "a result on demand was written in place through a view of it: use it once where gradients are recorded"
# These look at, or hook into, a gradient that was never computed: the loss did not go through this tensor.
_GRADIENT = {torch.Tensor.retain_grad, torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook}
# These give such a gradient to tensors that are named: `inputs`, the second argument of `grad`.
_ENGINE = {torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward}


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
        view: _View | None = None,
        hooks: bool = False,
    ) -> LazyTensor:
        """view: what it shares memory with; hooks: whether a hook on its gradient sees all of that"""
        strides = view.strides if view is not None else None

        def make() -> torch.Tensor:
            return torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=device)

        def inputs() -> list[Any]:
            return sources.checked() if rows is None else rows.values()

        if needs_grad and torch.is_grad_enabled():
            self = History.apply(make, inputs, compute if rows is None else rows.made_of, *inputs())
        else:
            self = make()
        self._compute, self._sources, self._value, self._needs_grad = compute, sources, None, needs_grad
        self._rows, self._view, self._hooks = rows, view, hooks or not needs_grad
        self._node, self._version_joined = node_of(self), 0
        _remember(self)
        return self

    def materialize(self) -> torch.Tensor:
        """The plain tensor; computed at the first call."""
        if self._value is None:
            if self._view is not None:
                self._settle(self._view.make())
            else:
                self._settle(self._compute(self._sources.checked()))
        return self._value

    def _settle(self, value: torch.Tensor) -> None:
        self._value, self._version_joined = value, version_of(value)
        self._compute = self._sources = self._rows = self._view = None

    def _follow(self, written: bool = False) -> None:
        """Make Python and C++ agree about values and history, wherever either was changed since.

        written: whether this comes behind what may have written the values
        """
        node = node_of(self)
        if node is not self._node:  # a function of autograd gave this very tensor back: it has its history by now
            self._node = node
            with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
                self._settle(torch.ops.aten.clone.default(self))
            self._needs_grad, self._hooks = True, True
        elif self._view is not None and self._view.source.is_there():
            self.materialize()
        value = self._value
        if not written and value is not None and value.requires_grad and self._stale() and not torch.is_grad_enabled():
            raise RuntimeError(_WRITTEN)  # a function of autograd may be running, which has taken the old history
        if value is not None and value.requires_grad and not value.is_inference():
            if node is None or getattr(self, "_joined", None) is not _history(value) or self._stale():
                self._node = join(self, value)
                self._joined, self._version_joined = _history(value), version_of(value)

    def _stale(self) -> bool:
        return version_of(self._value) != self._version_joined

    def used(self) -> None:
        """It goes into something by a way that no hook on its gradient, nor on that of its source, would see."""
        self._hooks = False
        if self._view is not None:
            self._view.source.used()

    def _check_hooks(self, func: Callable) -> None:
        """Refuse to give a gradient of which a part went by another way."""
        if not self._hooks:
            raise RuntimeError(
                f"{func.__name__} on a result that a loss was not computed from: the head and the loss were fused. Ask "
                "for it before the loss is computed, or keep them apart with "
                "rewriter.optimize(model, exclude=('linear_cross_entropy',))."
            )

    def is_there(self) -> bool:
        """Whether its values were computed, or those of what it is a view of."""
        return self._value is not None or (self._view is not None and self._view.source.is_there())

    @classmethod
    @torch.compiler.disable  # Dynamo meets it behind a graph break, and loses its way in here
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self = args[0] if args else None
        if isinstance(self, LazyTensor) and func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        lazy = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, LazyTensor)]
        for tensor in lazy:
            tensor._follow()
        if func in _ENGINE:
            for tensor in _differentiated(func, args, kwargs):
                tensor._check_hooks(func)
        if isinstance(self, LazyTensor):
            if func == _REQUIRES_GRAD and self._value is None:
                return self._needs_grad
            if func == _IS_LEAF and self._value is None:
                return not self._needs_grad
            if func in _GRADIENT:
                self._check_hooks(func)
            result = _by_rows(self, func, args[1:], kwargs)
            if result is NotImplemented:
                result = _follower(self, func, args[1:], kwargs)
            if result is not NotImplemented:
                return result
        result = func(*_materialized(args), **_materialized(kwargs))
        for tensor in lazy:
            tensor._follow(written=True)
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*_materialized(args, below=True), **_materialized(kwargs or {}, below=True))


@dataclass(frozen=True)
class _View:
    """What shares memory with another result on demand: `function(source)`, taken under the grad mode of its time."""

    source: LazyTensor
    function: Callable
    args: tuple
    kwargs: dict
    grad: bool
    strides: tuple[int, ...]

    def make(self) -> torch.Tensor:
        with torch.set_grad_enabled(self.grad):
            part = self.function(self.source.materialize(), *self.args, **self.kwargs)
        return part if self.grad else part.detach()


def _view(source: LazyTensor, function: Callable, args: tuple, kwargs: dict) -> _View | None:
    """function(source) as a view, or None where it is a copy. Raises what the function does for such strides."""
    if not may_share(function, args):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        whole = torch.empty_strided(source.size(), source.stride(), dtype=source.dtype, device="meta")
    part = function(whole, *args, **kwargs)
    if not torch._C._is_alias_of(part, whole):
        return None
    return _View(source, function, args, kwargs, torch.is_grad_enabled(), part.stride())


def _differentiated(func: Callable, args: tuple, kwargs: dict) -> list[LazyTensor]:
    """Results on demand that a backward pass is asked for the gradients of."""
    inputs = kwargs.get("inputs", args[1] if func is torch.autograd.grad and len(args) > 1 else None)
    return [t for t in pytree.tree_leaves(inputs) if isinstance(t, LazyTensor)]


def lazy_rows(rows: Rows, view: _View | None = None, hooks: bool = False) -> LazyTensor:
    """The tensor that `rows` describes."""

    def compute(_: list[torch.Tensor]) -> torch.Tensor:
        return rows.whole()

    sources, shape, device = rows.sources, rows.shape, rows.device
    return LazyTensor(compute, sources, shape, rows.dtype, device, rows.needs_grad, rows, view, hooks)


def _materialized(tree: Any, below: bool = False) -> Any:
    """below: in an operator that runs already, below autograd"""

    def plain(value: Any) -> Any:
        if not isinstance(value, LazyTensor):
            return value
        if not below:
            return value.materialize()
        if value._value is None:
            with outside():
                return value.materialize()
        if value._stale() and (value._needs_grad or value._value.requires_grad):
            raise RuntimeError(_WRITTEN)
        return value._value

    return pytree.tree_map(plain, tree)


def _by_rows(source: LazyTensor, func: Callable, args: tuple, kwargs: dict) -> Any:
    """`func(source)` by a way that never has all of it, or NotImplemented."""
    if source._rows is None:
        return NotImplemented

    def rows_of(value: Any) -> Any:
        return value._rows or value.materialize() if isinstance(value, LazyTensor) else value

    if func not in READABLE:
        return NotImplemented
    view = _view(source, func, args, kwargs)
    result = read(source._rows, func, pytree.tree_map(rows_of, args), pytree.tree_map(rows_of, kwargs))
    if result is source._rows:
        return source
    hooks = source._hooks
    if view is None and _has_gradient(result):
        source.used()
    return lazy_rows(result, view, hooks) if isinstance(result, Rows) else result


def _has_gradient(result: Any) -> bool:
    leaves = pytree.tree_leaves(result)
    return any(r.needs_grad if isinstance(r, Rows) else getattr(r, "requires_grad", False) for r in leaves)


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
    if func is not torch.Tensor.detach and dtype == source.dtype:
        return source
    needs_grad = needs_grad and torch.is_grad_enabled()

    def compute(sources: list[torch.Tensor]) -> torch.Tensor:
        return func(sources[0], *args)

    view, hooks = _view(source, func, args, kwargs), source._hooks
    if view is None and needs_grad:
        source.used()
    return LazyTensor(
        compute, Sources([source]), tuple(source.shape), dtype, source.device, needs_grad, None, view, hooks
    )


def _history(value: torch.Tensor) -> Any:
    """The node of a tensor that is none of ours; a leaf is its own."""
    return value.grad_fn or value


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
