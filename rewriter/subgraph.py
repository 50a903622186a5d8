"""Take a piece of a graph out as a GraphModule of its own, with or without rewrites in it, and run it in float64."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rewriter.meta import example, hint, tensor_meta
from rewriter.quantised import IN_FLOAT64

if TYPE_CHECKING:
    from rewriter.legality import Site


def extract(
    inputs: tuple[fx.Node, ...],
    nodes: tuple[fx.Node, ...],
    outputs: tuple[fx.Node, ...],
    sizes: Mapping[int, int] = {},
    rewritten: Sequence[Site] = (),
) -> fx.GraphModule:
    """A module (inputs) -> tuple(outputs). Integer constants found in `sizes` are replaced in shape arguments.

    A symbolic size is what it was when the graph was traced. rewritten: sites among `nodes` whose calls are put in.
    """
    root, graph = torch.nn.Module(), fx.Graph()
    new = {node: graph.placeholder(node.name) for node in inputs}

    def operand(node: fx.Node) -> Any:
        if node.op == "get_attr":  # a body of an autograd.Function
            setattr(root, node.target, getattr(node.graph.owning_module, node.target))
            return graph.get_attr(node.target)
        return new[node] if node in new else hint(example(node))

    for node in nodes:
        new[node] = graph.node_copy(node, operand)
        if sizes and isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in _SHAPED:
            new[node].args = pytree.tree_map(lambda a: sizes.get(a, a) if type(a) is int else a, new[node].args)
    output = graph.output(tuple(new[n] for n in outputs))
    if rewritten:
        _put_in(graph, rewritten, nodes, new, output)
    return fx.GraphModule(root, graph)


def _put_in(graph: fx.Graph, sites: Sequence[Site], nodes: tuple[fx.Node, ...], new: dict, output: fx.Node) -> None:
    """The calls of `sites` where replace.py would put them, and nothing that is dead afterwards."""
    order = {node: i for i, node in enumerate(sites[0].before.graph.nodes)}
    copies = dict(new)
    for site in sorted(sites, key=lambda s: order[s.before]):
        behind = (copies[node] for node in nodes if order[node] >= order[site.before])
        with graph.inserting_before(next(behind, output)):
            args, kwargs = fx.node.map_arg((site.call.args, dict(site.call.kwargs)), new.__getitem__)
            call = graph.call_function(site.call.fn, args, kwargs)
            results = [call]
            if len(site.outputs) > 1:
                results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(site.outputs))]
        for old, result in zip(site.outputs, results, strict=True):
            copies[old].replace_all_uses_with(result)
            new[old] = result
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    graph.lint()


aten = torch.ops.aten
_SHAPED = {aten.view, aten.reshape, aten.expand, aten.slice, aten.narrow, aten._unsafe_view, aten.unflatten}
_EXACT = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
          torch.complex32: torch.complex128, torch.complex64: torch.complex128}  # fmt: skip


class Float64(fx.Interpreter):
    """Runs a graph as mathematics: every cast to a narrower float type becomes one to float64.

    Dropout keeps what it keeps in the model's own dtype: another dtype may draw other random numbers.
    """

    def run_node(self, node: fx.Node) -> Any:
        meta = tensor_meta(node)
        if node.meta.get("forward") is not None:  # an autograd.Function: by the derivative of what it computes
            return Float64(node.meta["forward"]).run(*self.fetch_args_kwargs_from_env(node)[0][2:])
        if node.target is aten.dropout.default and meta is not None and node.args[2]:
            x, p = self.fetch_args_kwargs_from_env(node)[0][:2]
            kept = torch.dropout(torch.ones_like(x, dtype=meta.dtype), p, True) != 0
            return x * kept / (1 - p) if p < 1 else x * 0
        return super().run_node(node)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if isinstance(target, torch._ops.OpOverload) and target._schema.name in IN_FLOAT64:
            names = [argument.name for argument in target._schema.arguments]
            return IN_FLOAT64[target._schema.name](**dict(zip(names, args, strict=False)), **kwargs)
        args, kwargs = pytree.tree_map(lambda a: _EXACT.get(a, a) if _is_dtype(a) else a, (args, kwargs))
        if target in (aten.type_as.default, aten.to.other):
            return args[0].to(torch.float64) if args[0].is_floating_point() else target(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype)
