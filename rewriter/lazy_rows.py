"""Results on demand whose rows are computed one by one: what can be read of them without having all of them.

The logits of a head are a function of each row of its input. What looks at rows one at a time (argmax, logsumexp,
softmax and its entropy, a loss) runs on some rows after the other; what picks rows picks them from the input. Where a
gradient is wanted, each part is recomputed in backward, so it stays exact and never needs all rows either.

Functions here know tensors and `Rows`; lazy.py makes results on demand of the latter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rewriter.kernels.linear_cross_entropy import linear_cross_entropy
from rewriter.sources import Sources

ELEMENTS = 1 << 26  # of some rows at a time


@dataclass(frozen=True)
class Head:
    """Rows that are softcap(scale * (x @ weight.T + bias)), weight and bias given by their places among the sources.

    dtype:      what operands of the product are rounded to first, if anything
    transposed: whether the weight is [D, V]
    adapter:    sources -> (u [..., R], up [V, R]), where u @ up.T is added to the product
    """

    weight: int
    bias: int | None
    dtype: torch.dtype | None
    scale: float
    softcap: float | None
    transposed: bool = False
    adapter: Callable[[list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]] | None = None


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class Rows:
    """A tensor [..., V] that is `function` of the sources, row by row of source `place`, which is [..., D].

    picked:     what stands in for that source: some of its rows, or the same in another shape
    needs_grad: whether it has a gradient
    turned:     whether classes are dimension 1, as a cross entropy of more than rows wants them
    head:       what it is, where it is no more than a head's logits
    """

    sources: Sources
    place: int
    function: Callable[[list[torch.Tensor]], torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool
    picked: torch.Tensor | None = None
    turned: bool = False
    head: Head | None = None

    def values(self) -> list[torch.Tensor]:
        """All sources; raises Changed."""
        values = list(self.sources.checked())
        if self.picked is not None:
            values[self.place] = self.picked
        return values

    def whole(self) -> torch.Tensor:
        values = self.values()
        return self.made_of(values if self.needs_grad else [_detached(v) for v in values])

    def made_of(self, values: list[torch.Tensor]) -> torch.Tensor:
        """All of it."""
        result = self.function(values)
        return result.movedim(-1, 1) if self.turned else result

    def small(self) -> torch.Tensor:
        """One row of zeros with as many dimensions: to see what an operation makes of shape and dtype."""
        return torch.zeros([1] * (len(self.shape) - 1) + [self.shape[-1]], dtype=self.dtype, device=self.device)


def read(rows: Rows, function: Callable, args: tuple, kwargs: dict) -> Any:
    """function(rows, *args, **kwargs), as tensors or as Rows; NotImplemented if that takes all of it."""
    handler = _HANDLERS.get(function)
    if handler is None or not rows.shape or 0 in rows.shape:
        return NotImplemented
    if rows.turned and handler not in (_cross_entropy, _detach, _contiguous) and function not in _CASTS:
        return NotImplemented
    try:
        return handler(rows, function, *args, **kwargs)
    except TypeError:  # other arguments than a handler knows
        return NotImplemented


def _by_rows(rows: Rows, finish: Callable, *beside: torch.Tensor) -> list[torch.Tensor]:
    """finish(some rows [n, V], the same rows of each of `beside`), put together; each result is [all rows, ...]."""
    place, count, grad = rows.place, math.prod(rows.shape[:-1]), torch.is_grad_enabled() and rows.needs_grad
    sources = rows.values() if grad else [_detached(v) for v in rows.values()]
    x = sources[place].reshape(count, -1)

    def run(part: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = [*others[:place], part, *others[place : len(sources) - 1]]
        with torch.set_grad_enabled(grad):
            results = finish(rows.function(given).reshape(len(part), -1), *others[len(sources) - 1 :])
        return results if isinstance(results, tuple) else (results,)

    others = [s for i, s in enumerate(sources) if i != place]
    size = max(1, ELEMENTS // rows.shape[-1])
    parts = []
    for part in zip(*(t.split(size) for t in (x, *beside)), strict=True):
        given = [part[0], *others, *part[1:]]
        again = grad and count > size
        parts.append(checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False) if again else run(*given))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _last(rows: Rows, dim: Any) -> bool:
    """Whether `dim` is the last dimension, and that alone."""
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    return isinstance(dim, int) and dim in (-1, len(rows.shape) - 1)


# ---- what looks at each row


def _reduce(rows: Rows, function: Callable, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    if not _last(rows, dim) or options.pop("out", None) is not None:
        return NotImplemented
    inside = _as_here(rows)

    def finish(z: torch.Tensor) -> Any:
        with inside():
            result = function(z, dim=-1, **options)
        return tuple(result) if isinstance(result, tuple) else result

    shape = (*rows.shape[:-1], 1) if keepdim else rows.shape[:-1]
    results = [r.reshape(shape) for r in _by_rows(rows, finish)]
    return _like(function, rows, results)


def _argmax(rows: Rows, function: Callable, dim: int | None = None, keepdim: bool = False) -> Any:
    return _reduce(replace(rows, needs_grad=False), function, dim, keepdim)


def _topk(rows: Rows, function: Callable, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not _last(rows, dim):
        return NotImplemented
    results = _by_rows(rows, lambda z: tuple(torch.topk(z, k, -1, largest, sorted)))
    return torch.return_types.topk([r.reshape(*rows.shape[:-1], k) for r in results])


def _gather(rows: Rows, function: Callable, dim: int, index: torch.Tensor) -> Any:
    if not _last(rows, dim) or index.shape[:-1] != rows.shape[:-1]:
        return NotImplemented
    (result,) = _by_rows(rows, lambda z, i: z.gather(-1, i), index.reshape(-1, index.shape[-1]))
    return result.reshape(index.shape)


def _cross_entropy(
    rows: Rows, function: Callable, target: torch.Tensor, weight: torch.Tensor | None = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    """In float32, rounded to the dtype of the logits in the end; fused where they are a head's."""
    if rows.turned:
        if target.shape != (rows.shape[0], *rows.shape[2:]):
            return NotImplemented
        x = rows.values()[rows.place].flatten(0, -2)
        flat = replace(rows, turned=False, picked=x, shape=(len(x), rows.shape[1]))
        options = weight, size_average, ignore_index, reduce, reduction, label_smoothing
        loss = _cross_entropy(flat, function, target.flatten(), *options)
        return loss.reshape(target.shape) if isinstance(loss, torch.Tensor) and reduction == "none" else loss
    count = rows.shape[0]
    known = len(rows.shape) == 2 and target.shape == (count,) and not target.is_floating_point()
    if not known or size_average is not None or reduce is not None or (weight is not None and weight.requires_grad):
        return NotImplemented
    wide = torch.promote_types(rows.dtype, torch.float32)
    dtype = F.cross_entropy(rows.small().repeat(2, 1), target.new_zeros(2)).dtype if rows.dtype != wide else wide

    if rows.head is not None and rows.dtype != torch.float64:
        values = rows.values() if rows.needs_grad else [_detached(v) for v in rows.values()]
        bias = None if rows.head.bias is None else values[rows.head.bias]
        matrix = values[rows.head.weight].t() if rows.head.transposed else values[rows.head.weight]
        u, up = (None, None) if rows.head.adapter is None else rows.head.adapter(values)
        return linear_cross_entropy(
            values[rows.place], matrix, target, bias=bias, u=u, up=up, ignore_index=ignore_index,
            reduction=reduction, label_smoothing=label_smoothing, class_weight=weight, matmul_dtype=rows.head.dtype,
            scale=rows.head.scale, softcap=rows.head.softcap, out_dtype=dtype,
        )  # fmt: skip

    def finish(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            w = weight if weight is None else weight.to(wide)
            return F.cross_entropy(
                z.to(wide), t, w, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
            )

    (losses,) = _by_rows(rows, finish, target)
    if reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if reduction == "mean":
        kept = target != ignore_index
        total = total / (kept.sum() if weight is None else weight[target.where(kept, 0)].to(wide).where(kept, 0).sum())
    return total.to(dtype)


# ---- what makes other rows of them


def _map(rows: Rows, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """An operation on every element, or on every row by itself, with numbers and dtypes as its other arguments.

    A cast to the dtype that they have gives the very same.
    """
    if any(isinstance(a, torch.Tensor) for a in (*args, *kwargs.values())):
        return NotImplemented
    inside, before = _as_here(rows), rows.function

    def after(sources: list[torch.Tensor]) -> torch.Tensor:
        z = before(sources)
        with inside():
            return function(z, *args, **kwargs)

    small = rows.small()
    result = function(small, *args, **kwargs)
    if result is small:
        return rows
    dtype = result.dtype
    grad = rows.needs_grad and torch.is_grad_enabled()
    wider = function in _CASTS and torch.promote_types(rows.dtype, dtype) == dtype  # which a loss in float32 is anyway
    return replace(rows, function=after, dtype=dtype, needs_grad=grad, head=rows.head if wider else None)


def _softmax(rows: Rows, function: Callable, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if not _last(rows, dim):
        return NotImplemented
    plain = torch.log_softmax if "log" in function.__name__ else torch.softmax
    return _map(rows, plain, dim=-1, dtype=dtype)


def _to(rows: Rows, function: Callable, dtype: Any) -> Any:
    return _map(rows, function, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


def _detach(rows: Rows, function: Callable) -> Rows:
    return replace(rows, needs_grad=False)


def _product(rows: Rows, function: Callable, other: Any) -> Any:
    """By a number, or by other rows of the same sources: `p * p.log()`."""
    if not isinstance(other, Rows):
        return _map(rows, function, other)
    same = (
        other.sources is rows.sources and not other.turned and other.picked is rows.picked and other.shape == rows.shape
    )
    if not same:
        return NotImplemented
    inside = _as_here(rows)

    def after(sources: list[torch.Tensor]) -> torch.Tensor:
        one, two = rows.function(sources), other.function(sources)
        with inside():
            return function(one, two)

    grad = (rows.needs_grad or other.needs_grad) and torch.is_grad_enabled()
    dtype = function(rows.small(), other.small()).dtype
    return replace(rows, function=after, dtype=dtype, needs_grad=grad, head=None)


# ---- what picks rows


def _picked(rows: Rows, x: torch.Tensor) -> Rows:
    grad = rows.needs_grad and torch.is_grad_enabled()
    return replace(rows, picked=x, shape=(*x.shape[:-1], rows.shape[-1]), needs_grad=grad)


def _index(rows: Rows, function: Callable, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    known = (int, slice, torch.Tensor, type(None), type(Ellipsis))
    if any(not isinstance(p, known) or isinstance(p, bool) or getattr(p, "dtype", None) is torch.uint8 for p in parts):
        return NotImplemented
    taken = [p.dim() if isinstance(p, torch.Tensor) and p.dtype is torch.bool else p is not None for p in parts]
    behind = next((i for i, p in enumerate(parts) if p is Ellipsis), None)
    reaches_last = sum(taken) - (behind is not None) >= len(rows.shape) or behind not in (None, len(parts) - 1)
    if reaches_last and not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
        return NotImplemented
    return _picked(rows, function(rows.values()[rows.place], index))


def _reshape(rows: Rows, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Any that keeps rows whole and in their order."""
    shape = function(torch.empty(rows.shape, device="meta"), *args, **kwargs).shape
    if not shape or shape[-1] != rows.shape[-1] or math.prod(shape[:-1]) != math.prod(rows.shape[:-1]):
        return NotImplemented
    x = rows.values()[rows.place]
    return _picked(rows, x.reshape(*shape[:-1], x.shape[-1]))


def _permute(rows: Rows, function: Callable, *dims: Any) -> Any:
    """Any that leaves the classes behind, or puts them behind the first dimension and all else in its order."""
    count = len(rows.shape)
    order = function(
        torch.empty(tuple(range(count)), device="meta"), *dims
    ).shape  # lengths that tell where each came from
    if order[-1] == count - 1:
        return _picked(rows, rows.values()[rows.place].permute(*order))
    if count < 3 or tuple(order) != (0, count - 1, *range(1, count - 1)):
        return NotImplemented
    shape = (rows.shape[0], rows.shape[-1], *rows.shape[1:-1])
    return replace(rows, turned=True, shape=shape, needs_grad=rows.needs_grad and torch.is_grad_enabled())


def _contiguous(rows: Rows, function: Callable) -> Rows:
    return replace(rows)


def may_share(function: Callable, args: tuple) -> bool:
    """Whether a result can share memory with what it is read from."""
    handler = _HANDLERS.get(function)
    if handler is _index:
        return not any(isinstance(a, torch.Tensor) for a in torch.utils._pytree.tree_leaves(args))
    return handler in (_reshape, _detach, _permute)


# ----


def _as_here(rows: Rows) -> Callable[[], contextlib.AbstractContextManager]:
    """The autocast of here and now, for later."""
    kind = rows.device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)


def _like(function: Callable, rows: Rows, results: list[torch.Tensor]) -> Any:
    if len(results) == 1:
        return results[0]
    return type(function(rows.small(), dim=-1))(results)


def _both(name: str) -> Iterator[Callable]:
    """The function of torch and the method of this name."""
    yield from (getattr(owner, name) for owner in (torch, torch.Tensor) if hasattr(owner, name))


_TABLE = (
    (_argmax, ("argmax", "argmin")),
    (_reduce, ("max", "min", "amax", "amin", "logsumexp", "sum", "mean")),
    (_topk, ("topk",)),
    (_gather, ("gather",)),
    (_softmax, ("softmax", "log_softmax")),
    (_map, ("float", "double", "half", "bfloat16", "exp", "log", "tanh", "neg", "clamp", "sub", "add", "__rsub__",
            "__radd__", "square", "sqrt")),
    (_product, ("mul", "__rmul__", "div", "true_divide")),
    (_to, ("to", "type")),
    (_detach, ("detach",)),
    (_index, ("__getitem__",)),
    (_reshape, ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")),
    (_permute, ("transpose", "permute", "movedim", "swapaxes", "swapdims", "moveaxis")),
    (_contiguous, ("contiguous",)),
)  # fmt: skip
_CASTS = {torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.to}
_HANDLERS = {function: handler for handler, names in _TABLE for name in names for function in _both(name)}
_HANDLERS |= {F.softmax: _softmax, F.log_softmax: _softmax, F.cross_entropy: _cross_entropy}
READABLE = frozenset(_HANDLERS)
