"""What the compiler knows of a value without running it: `TensorMeta`, kept in `node.meta["tensor"]`."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


def hint(value: Any) -> int:
    """The integer behind a size: itself, or the example that a symbolic size was traced with."""
    if isinstance(value, torch.SymInt):
        size = value.node.hint
        if size is None:
            raise ValueError(f"the size {value} depends on data")
        return int(size)
    return int(value)


def _is_fixed(size: Any) -> bool:
    """Whether a size is the same in every call: a symbol may have been found equal to a number since it was made."""
    return not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None


@dataclass(frozen=True)
class TensorMeta:
    """Shape and strides are the example's sizes; `static[d]` is False where dimension d may change between calls."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    static: tuple[bool, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorMeta:
        return cls(
            shape=tuple(hint(s) for s in tensor.shape),
            stride=tuple(hint(s) for s in tensor.stride()),
            dtype=tensor.dtype,
            device=tensor.device,
            requires_grad=tensor.requires_grad,
            static=tuple(_is_fixed(s) for s in tensor.shape),
        )

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def order(self) -> tuple[int, ...]:
        """Dimensions from the outermost to the innermost in memory."""
        return tuple(sorted(range(self.ndim), key=lambda d: -self.stride[d]))

    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True

    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


def tensor_meta(node: fx.Node) -> TensorMeta | None:
    """The meta of a node that yields one tensor; None for any other node."""
    return node.meta.get("tensor")


def example(node: fx.Node) -> Any:
    """The fake value a node was traced with (Dynamo's, or that of a trace of our own)."""
    return node.meta.get("example_value", node.meta.get("val"))


def set_example(node: fx.Node, value: Any) -> None:
    """Record the fake value of a node together with its TensorMeta."""
    node.meta["example_value"] = value
    node.meta.pop("tensor", None)
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        try:
            node.meta["tensor"] = TensorMeta.of(value)
        except (ValueError, RuntimeError):
            return  # a data-dependent size: nothing is known of it, so no pattern will touch it


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether a node draws random numbers, as far as can be told: a call that nothing is known of may."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is not operator.getitem and node.meta.get("forward") is None
    if node.target is torch.ops.aten.dropout.default:
        return bool(node.args[1]) and bool(node.args[2])
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0) != 0.0
    return torch.Tag.nondeterministic_seeded in node.target.tags
