"""Activations that need not be kept: a kernel of backward, which reads what they were made of, writes them again.

    forward   y = kernel(x, ...), z = linear(y)              kept: x and y
    backward  dy, and y once more for dW = dz^T y            with this pass kept: x alone

Where the backward kernel that belongs to y (a norm's, a gated unit's) reads x anyway, writing y beside dx costs one
write. What needs y in backward then follows that kernel. A pass over AOTAutograd's joint graph, before it is cut into
forward and backward. Values are the same in every bit, as both kernels compute y alike.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort

from rewriter.kernels import common
from rewriter.kernels.common import MADE_AGAIN, MadeAgain, triton
from rewriter.log import log

aten = torch.ops.aten
VIEWS = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.t.default,
        aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int,
        aten.split.Tensor, aten.expand.default, aten.alias.default, operator.getitem,
    }
)  # fmt: skip
SIZES = {aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default}
TILES = {"ROWS", "COLUMNS"}  # how a kernel goes about it, not what it computes


class MakeAgain(CustomGraphPass):
    """The pass as Inductor takes it, after one of the user's own if there is one."""

    def __init__(self, tell: Callable[[list[str]], None] = lambda made: None) -> None:
        """tell: is given what `make_again` gives back."""
        self.first, self.tell = config.joint_custom_pre_pass, tell

    def __call__(self, graph: fx.Graph) -> None:
        if self.first is not None:
            self.first(graph)
        self.tell(make_again(graph))

    def uuid(self) -> Any:
        """What cached graphs depend on; None, which is never cached, behind a pass that can't say that of itself."""
        if self.first is not None and not isinstance(self.first, CustomGraphPass):
            return None
        kernels = [again.backward for again in MADE_AGAIN.values()]
        files = {__file__, common.__file__, *(inspect.getfile(kernel.fn) for kernel in kernels)}
        return get_hash_for_files(tuple(sorted(files))), self.first and self.first.uuid()


def make_again(graph: fx.Graph) -> list[str]:
    """Rewrite a joint graph in place; the pattern of each result that backward makes again."""
    if any("recompute" in node.meta for node in graph.nodes):  # somebody else has decided what is kept
        return []
    launches = [n for n in graph.nodes if n.target is triton_kernel_wrapper_functional]
    late = backward_nodes(graph)
    made = []
    for forward in launches:
        again = MADE_AGAIN.get(_kernel(forward))
        if again is None or forward in late:
            continue
        result = next((u for u in forward.users if u.target is operator.getitem and u.args[1] == again.result), None)
        users = _late_users(result, late) if result is not None else []
        backward = next((n for n in launches if n in late and _is_backward_of(n, forward, again)), None)
        if not users or backward is None or _followers(users) & _ancestors([backward]):
            continue
        with graph.inserting_before(backward):
            place = _empty_like(graph, result.meta["val"], backward)
        if place is not None:
            _write_again(graph, backward, place, result, users)
            log.debug("backward makes %s again, instead of keeping it", result.name)
            made.append(again.pattern)
    if made:
        stable_topological_sort(graph)
        graph.lint()
    return made


def backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """What no result of forward needs."""
    given = _followers(n for n in graph.nodes if n.op == "placeholder" and "tangents" in str(n.target))
    output = graph.output_node()
    early = _ancestors(n for n in output.all_input_nodes if n not in given)
    return {n for n in graph.nodes if n not in early and n.op not in ("placeholder", "output")}


def _kernel(launch: fx.Node) -> Any:
    kernel = kernel_side_table.get_kernel(launch.kwargs["kernel_idx"])
    # A launch that says how many warps it takes is traced as that of an autotuner with one choice.
    return kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel


def _arguments(launch: fx.Node) -> dict[str, Any]:
    """All arguments of the kernel by name: nodes, numbers, and what the graph can't hold."""
    return {**kernel_side_table.get_constant_args(launch.kwargs["constant_args_idx"]), **launch.kwargs["kwargs"]}


def _is_backward_of(launch: fx.Node, forward: fx.Node, again: MadeAgain) -> bool:
    if _kernel(launch) is not again.backward:
        return False
    theirs, ours = _arguments(launch), _arguments(forward)
    if theirs[again.result] is not None:
        return False  # it is written already
    constants = {p.name for p in again.backward.params if p.is_constexpr} - TILES
    if any(theirs[name] != ours[name] for name in constants & ours.keys()):
        return False
    written = {u.args[1]: u for u in forward.users if u.target is operator.getitem}
    return all(_same(theirs[name], written.get(name, ours[name])) for name in again.inputs)


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are one node, or equal views of one."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        if a is b:
            return True
        alike = a.target is b.target and a.target in VIEWS and a.kwargs == b.kwargs and len(a.args) == len(b.args)
        return alike and all(_same(x, y) for x, y in zip(a.args, b.args, strict=True))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def _followers(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that depends on them."""
    return _reached(nodes, lambda node: node.users)


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they depend on."""
    return _reached(nodes, lambda node: node.all_input_nodes)


def _reached(nodes: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += following(node)
    return found


def _late_users(node: fx.Node, late: set[fx.Node]) -> list[fx.Node]:
    """What reads the result, or a view of it, in backward; what asks for sizes does not."""
    users = []
    for user in node.users:
        if user.target in VIEWS:
            users += _late_users(user, late)
        elif user in late and user.target not in SIZES:
            users.append(user)
    return users


def _write_again(graph: fx.Graph, backward: fx.Node, place: fx.Node, result: fx.Node, users: list[fx.Node]) -> None:
    """`backward` writes `result` to `place`, too, and `users` read that instead."""
    name = result.args[1]
    constants = kernel_side_table.get_constant_args(backward.kwargs["constant_args_idx"])
    index = kernel_side_table.add_constant_args({key: value for key, value in constants.items() if key != name})

    def changed(keywords: Any, value: Any) -> dict[str, Any]:
        return type(keywords)(
            {
                **keywords,
                "constant_args_idx": index,
                "kwargs": type(keywords["kwargs"])({**keywords["kwargs"], name: value}),
                "tensors_to_clone": type(keywords["tensors_to_clone"])([*keywords["tensors_to_clone"], name]),
            }
        )

    backward.kwargs = changed(backward.kwargs, place)
    value = _fresh(result.meta["val"])
    backward.meta["val"] = {**backward.meta["val"], name: value}
    if "eager_input_vals" in backward.meta:  # what the arguments were in eager, one for one
        positional, keywords = backward.meta["eager_input_vals"]
        backward.meta["eager_input_vals"] = positional, changed(keywords, place.meta["val"])
    with graph.inserting_after(backward):
        written = graph.call_function(operator.getitem, (backward, name))
    written.meta["val"] = value
    replaced = {result: written}

    def instead(node: fx.Node) -> fx.Node:
        if node not in replaced and node.target in VIEWS and _is_view_of(node, result):
            at = instead(node.args[0])
            with graph.inserting_after(at):
                copy = replaced[node] = graph.node_copy(node, lambda n: replaced.get(n, n))
            with value.fake_mode:
                copy.meta["val"] = copy.target(*fx.map_arg(copy.args, lambda n: n.meta["val"]), **copy.kwargs)
        return replaced.get(node, node)

    for user in users:
        user.args = fx.map_arg(user.args, instead)
        user.kwargs = fx.map_arg(user.kwargs, instead)


def _is_view_of(node: fx.Node, source: fx.Node) -> bool:
    while node is not source and node.target in VIEWS and node.args:
        node = node.args[0]
    return node is source


def _empty_like(graph: fx.Graph, tensor: torch.Tensor, launch: fx.Node) -> fx.Node | None:
    """A new dense tensor of the same sizes, those that change read off an argument of the launch; None without one."""
    sizes = list(map(_size, tensor.shape))
    given = [n for n in launch.kwargs["kwargs"].values() if isinstance(n, fx.Node)]
    values = {n: n.meta["val"] for n in given if isinstance(n.meta.get("val"), torch.Tensor)}
    alike = next((n for n, value in values.items() if list(map(_size, value.shape)) == sizes), None)
    if alike is None or not _is_dense(tensor):
        return None
    for dim, size in enumerate(tensor.shape):
        if not isinstance(size, int):
            sizes[dim] = graph.call_function(aten.sym_size.int, (alike, dim))
            sizes[dim].meta["val"] = size
    options = {"dtype": tensor.dtype, "device": tensor.device, "pin_memory": False}
    empty = graph.call_function(aten.empty.memory_format, (sizes,), options)
    empty.meta["val"] = _fresh(tensor)
    return empty


def _size(size: Any) -> Any:
    """A size to be compared with others, which a changing one itself would take for a promise about its values."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _is_dense(tensor: torch.Tensor) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if _size(stride) != _size(step):
            return False
        step = step * size
    return True


def _fresh(tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor like this one that shares its memory with none: Inductor finds by that what it may write."""
    with tensor.fake_mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
