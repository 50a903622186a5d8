"""Lower a Dynamo graph (torch functions and methods) to pre-dispatch ATen, node by node.

Node by node, because tracing a whole graph runs through higher-order operators: activation checkpointing fails and
`autograd_function_apply` is inlined without its backward. Those stay as they are; checkpointed bodies are lowered too,
and what an autograd.Function computes forward is noted beside it (functions.py).
A node that can't be lowered stays as it is and is opaque to the patterns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._functorch.autograd_function import autograd_function_apply
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from rewriter.einsum import einsum
from rewriter.functions import forward_of
from rewriter.log import log
from rewriter.meta import example, set_example, tensor_meta

GRAD_SWITCH = torch._C._set_grad_enabled
AUTOCAST_ENTER = torch.amp.autocast_mode._enter_autocast
AUTOCAST_EXIT = torch.amp.autocast_mode._exit_autocast

_DETACHED = {torch.ops.aten.detach.default, torch.ops.aten.detach_.default}
# Torch functions that are lowered as what they mean.
_MEANING = {torch.einsum: einsum}
# Calls whose effect is Python-side or in place on sizes: tracing them again would be wrong.
_PLAIN_PYTHON = {isinstance, torch.sym_int, torch.sym_float}
_RESIZING = ("resize_", "set_", "t_", "transpose_", "swapaxes_", "swapdims_", "unsqueeze_", "squeeze_", "as_strided_")


def ambient() -> tuple:
    """The global state that decides what an operator computes: grad mode, and autocast per device type."""
    cast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))
    return torch.is_grad_enabled(), cast


class Lowering:
    """Lowers graphs; one instance per backend, so that traces of equal nodes are shared by all graphs."""

    def __init__(self) -> None:
        self._traces: dict[Any, fx.GraphModule | None] = {}

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A new GraphModule of ATen operators; placeholders, outputs and submodules keep their names and order."""
        graph = fx.Graph()
        new: dict[fx.Node, Any] = {}
        with _preserved_state() as state:
            for node in gm.graph.nodes:
                new[node] = self._lower_node(gm, graph, node, new, state)
        self._traces = {k: v for k, v in self._traces.items() if not _is_symbolic(k)}
        lowered = fx.GraphModule(gm, graph)
        lowered.meta.update(gm.meta)
        return lowered

    def _lower_node(self, gm: fx.GraphModule, graph: fx.Graph, node: fx.Node, new: dict, state: _State) -> Any:
        state.step(node)
        if node.target is operator.getitem and isinstance(new.get(node.args[0]), tuple | list):
            return new[node.args[0]][node.args[1]]  # one of several results of a node that was lowered
        inner = self._trace(gm, node) if self._lowerable(node) else None
        if inner is None:
            copy = graph.node_copy(node, lambda n: new[n])
            copy.meta = dict(node.meta)
            set_example(copy, example(node))
            copy.meta["ambient"] = ambient()
            if node.target is autograd_function_apply:
                copy.meta["forward"] = forward_of(self, gm, node)
            return copy
        operands = iter(_operands(node, new))
        local: dict[fx.Node, Any] = {}
        created = set()
        for inode in inner.graph.nodes:
            if inode.op == "placeholder":
                value = next(operands)
                if isinstance(value, _Entry) and inode.users:
                    entry, value = value, graph.call_function(operator.getitem, (value.whole, value.index))
                    set_example(value, example(entry.whole)[entry.index])
                    value.meta["ambient"] = ambient()
                local[inode] = value
            elif inode.op == "output":
                result = pytree.tree_map_only(fx.Node, lambda n: local[n], inode.args[0])
            else:
                copy = local[inode] = graph.node_copy(inode, lambda n: local[n])
                copy.meta = {k: v for k, v in node.meta.items() if k not in ("example_value", "val")}
                set_example(copy, inode.meta.get("val"))
                copy.meta["ambient"] = ambient()
                _require_grad(copy)
                created.add(copy)
        was = example(node)
        if isinstance(was, torch.Tensor) and isinstance(result, tuple | list):
            (result,) = result  # a trace with tuples among its inputs gives a list
        several = isinstance(was, tuple | list) and isinstance(result, tuple | list) and len(was) == len(result)
        for made, value in zip(result, was, strict=True) if several else [(result, was)]:
            if isinstance(made, fx.Node) and made in created:
                set_example(made, value)
        return result

    @staticmethod
    def _lowerable(node: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method"):
            return False
        if node.op == "call_method":
            return node.target not in _RESIZING and _has_tensor(node)
        target = node.target
        if target is operator.getitem:  # indexing a tensor is an operator, indexing a tuple is not
            return isinstance(node.args[0], fx.Node) and isinstance(example(node.args[0]), torch.Tensor)
        if target is getattr:  # an attribute such as `x.T` is an operator, one such as `x.shape` is not
            return isinstance(example(node), torch.Tensor)
        if isinstance(target, torch._ops.HigherOrderOperator) or target in _PLAIN_PYTHON:
            return False
        if isinstance(target, torch._ops.OpOverload):
            return False
        made_of_sizes = all(isinstance(example(n), torch.SymInt) for n in node.all_input_nodes)
        return _has_tensor(node) or (made_of_sizes and isinstance(example(node), FakeTensor))

    def _trace(self, gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
        key = _trace_key(node)
        if key is not None and key in self._traces:
            return self._traces[key]
        try:
            inner = _trace_one(node)
        except Exception as error:  # any operator we can't trace alone is left to run as Dynamo captured it
            log.debug("not lowered: %s (%s: %s)", node.format_node(), type(error).__name__, error)
            inner = None
        if key is not None:
            self._traces[key] = inner
        return inner


def _require_grad(node: fx.Node) -> None:
    """What tracing recorded of an intermediate result is detached: it requires a gradient where an operand does."""
    meta = tensor_meta(node)
    if meta is None or not meta.dtype.is_floating_point or not torch.is_grad_enabled() or node.target in _DETACHED:
        return
    operands = list(node.all_input_nodes)
    if len(operands) == 1 and tensor_meta(operands[0]) is None:
        operands = list(operands[0].all_input_nodes)  # one of several results
    metas = [m for n in operands if (m := tensor_meta(n)) is not None]
    if any(m.requires_grad for m in metas):
        node.meta["tensor"] = dataclasses.replace(meta, requires_grad=True)


def _trace_one(node: fx.Node) -> fx.GraphModule | None:
    leaves = list(_leaves(node))
    values = [example(leaf) for leaf in leaves]
    if any(v is None for v in values):
        return None
    if any(isinstance(entry, tuple | list) for v in values if isinstance(v, tuple | list) for entry in v):
        return None

    def run(*flat: Any) -> Any:
        value = dict(zip(leaves, flat, strict=True))
        args, kwargs = _filled((_listed(node.args), dict(node.kwargs)), value.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return _MEANING.get(node.target, node.target)(*args, **kwargs)

    mode = next((v.fake_mode for v in (*values, example(node)) if isinstance(v, FakeTensor)), contextlib.nullcontext())
    with mode:  # tensors that operators make of numbers are fake too
        inner = make_fx(run, pre_dispatch=True, _error_on_data_dependent_ops=False)(*values)
    if any(n.op == "get_attr" for n in inner.graph.nodes):
        return None  # a tensor constant was lifted: keep the node as it was
    return inner


class _Entry(NamedTuple):
    """One entry of a tuple, such as a size, that a node takes whole."""

    whole: fx.Node
    index: int


def _operands(node: fx.Node, new: dict) -> Iterator[Any]:
    """What the inputs of a node's trace stand for: tracing takes a tuple as its entries."""
    for leaf in _leaves(node):
        value = example(leaf)
        if not isinstance(value, tuple | list):
            yield new[leaf]
        elif isinstance(new[leaf], tuple | list):
            yield from new[leaf]
        else:
            yield from (_Entry(new[leaf], i) for i in range(len(value)))


def _leaves(node: fx.Node) -> list[fx.Node]:
    """Argument nodes of a node, once each, in order."""
    return list(dict.fromkeys(node.all_input_nodes))


def _listed(tree: Any) -> Any:
    """fx's immutable containers and slices as plain ones that pytree and operators accept."""
    if isinstance(tree, tuple | list):
        return type(tree)(map(_listed, tree)) if type(tree) in (tuple, list) else [_listed(t) for t in tree]
    return tree


def _filled(tree: Any, value: Any) -> Any:
    """The tree with `value(node)` for each node, also in slices."""

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return value(leaf)
        if isinstance(leaf, slice):
            return slice(*map(fill, (leaf.start, leaf.stop, leaf.step)))
        return leaf

    return pytree.tree_map(fill, tree)


def _has_tensor(node: fx.Node) -> bool:
    return any(isinstance(example(n), torch.Tensor) for n in node.all_input_nodes)


def _trace_key(node: fx.Node) -> Any:
    """Equal keys have equal traces: same target, constants, input metas and ambient state. None: don't share."""
    order = {leaf: i for i, leaf in enumerate(_leaves(node))}
    # Two nodes may be one tensor (a cast to its own dtype gives its operand back): their trace has but one of them.
    tensors = [id(example(leaf)) for leaf in order]
    metas: list[Any] = [tuple(map(tensors.index, tensors))]
    for leaf in order:
        value = example(leaf)
        if not isinstance(value, torch.Tensor):
            return None
        sizes = [(*value.shape, *value.stride())]
        if any(isinstance(s, torch.SymInt) for s in sizes[0]):
            if not isinstance(value, FakeTensor):
                return None
            sizes = [id(value.fake_mode), str(sizes[0])]  # symbolic sizes belong to one compilation
        metas.append((type(value), value.dim(), *sizes, value.dtype, value.device, value.requires_grad))
    if not order:  # a tensor made of numbers: its type and place may come from a default
        made = example(node)
        metas.append((made.dtype, made.device, tuple(made.shape)))
    spec = repr(_filled((_listed(node.args), dict(node.kwargs)), lambda n: _Index(order[n])))
    return node.op, node.target, spec, tuple(metas), ambient()


def _is_symbolic(key: Any) -> bool:
    return any(len(meta) > 3 and isinstance(meta[3], str) for meta in key[3][1:])


class _Index(int):
    def __repr__(self) -> str:
        return f"%{int(self)}"


class _State:
    """Replays the graph's own switches of grad mode and autocast, so that each node is traced as it will run."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._contexts: dict[fx.Node, Any] = {}

    def step(self, node: fx.Node) -> None:
        if node.op != "call_function":
            return
        if node.target is GRAD_SWITCH:
            torch._C._set_grad_enabled(node.args[0])
        elif node.target is AUTOCAST_ENTER:
            context = self._contexts[node] = AUTOCAST_ENTER(*node.args)
            self._stack.callback(self._close, node, context)
        elif node.target is AUTOCAST_EXIT:
            self._close(node.args[0], self._contexts[node.args[0]])

    def _close(self, node: fx.Node, context: Any) -> None:
        if self._contexts.pop(node, None) is not None:
            AUTOCAST_EXIT(context)


@contextlib.contextmanager
def _preserved_state():
    with torch.set_grad_enabled(torch.is_grad_enabled()), contextlib.ExitStack() as stack:
        yield _State(stack)
