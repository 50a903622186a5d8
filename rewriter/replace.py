"""Splice verified sites into the graph, and take out what they made dead."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rewriter.legality import Site
from rewriter.meta import TensorMeta, example, set_example, tensor_meta
from rewriter.subgraph import extract

_KEPT_META = ("nn_module_stack", "source_fn_stack", "stack_trace", "ambient")


@dataclass(frozen=True)
class LazyOutput:
    """A graph output that is computed on demand.

    index:   its place among the outputs that the caller expects
    kept:    how many of the new graph's outputs the caller gets; the rest serve lazy outputs
    module:  computes it from `sources`: ("input", i) is the graph's i-th input, ("output", i) its i-th new output
    rows:    the source of which each row makes a row of it, if there is one
    hooks:   whether all of its gradient comes by way of it: no loss was computed beside it
    """

    index: int
    kept: int
    module: fx.GraphModule
    sources: tuple[tuple[str, int], ...]
    meta: TensorMeta
    ambient: tuple | None
    dtypes: tuple[torch.dtype, ...]
    rows: int | None
    hooks: bool
    _shapes: dict = field(default_factory=dict)
    parts: dict = field(default_factory=dict)  # of the module, for those who take it apart

    def shape_of(self, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        """The output's shape for sources of these shapes, found by a run without data."""
        if shapes not in self._shapes:
            device = self.meta.device
            with FakeTensorMode():
                empty = [torch.empty(s, dtype=d, device=device) for s, d in zip(shapes, self.dtypes, strict=True)]
                self._shapes[shapes] = tuple(self.module(*empty)[0].shape)
        return self._shapes[shapes]


@dataclass(frozen=True)
class Promise:
    """An output to be computed on demand: by `module`, of `inputs`. rows: as in LazyOutput, the place among inputs."""

    result: fx.Node
    inputs: tuple[fx.Node, ...]
    module: fx.GraphModule
    rows: int | None
    hooks: bool = True


def replace_sites(gm: fx.GraphModule, sites: list[Site], promised: Iterable[Promise] = ()) -> list[LazyOutput]:
    """Rewrite the graph in place; the lazy outputs were removed from its output, in the order given back.

    promised: further outputs that become lazy
    """
    graph = gm.graph
    new: dict[fx.Node, fx.Node] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    # Copies of the original operators, so they are taken before anything is spliced in.
    promised = [*(_promise(s, n) for s in sites for n in s.lazy), *promised]
    for site in sorted(sites, key=lambda s: order[s.before]):
        _splice(graph, site, new)
    lazy = _delay_outputs(graph, promised, new)
    for site in reversed(sites):
        for node in reversed(site.covered):
            if not node.users and node.graph is graph and not node._erased:
                graph.erase_node(node)
    for promise in promised:
        _erase_dead(graph, promise.result, set(promise.inputs))
    graph.lint()
    gm.recompile()
    return lazy


def _promise(site: Site, node: fx.Node) -> Promise:
    module = extract(site.inputs, _between(site, node), (node,))
    return Promise(node, site.inputs, module, _rows(site, module), hooks=False)


def _erase_dead(graph: fx.Graph, node: fx.Node, inputs: set[fx.Node]) -> None:
    """What was there for nothing but a result that is no longer computed."""
    if node in inputs or node._erased or node.users:
        return
    operands = node.all_input_nodes
    graph.erase_node(node)
    for operand in operands:
        _erase_dead(graph, operand, inputs)


def _splice(graph: fx.Graph, site: Site, new: dict[fx.Node, fx.Node]) -> None:
    args, kwargs = pytree.tree_map_only(fx.Node, lambda n: new.get(n, n), (site.call.args, dict(site.call.kwargs)))
    with graph.inserting_before(site.before):
        call = graph.call_function(site.call.fn, args, kwargs)
        results = [call]
        if len(site.outputs) > 1:
            results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(site.outputs))]
    for old, result in zip(site.outputs, results, strict=True):
        for key in _KEPT_META:
            if key in old.meta:
                result.meta[key] = old.meta[key]
                call.meta.setdefault(key, old.meta[key])
        set_example(result, example(old))
        old.replace_all_uses_with(result)
        new[old] = result


def _between(site: Site, node: fx.Node) -> tuple[fx.Node, ...]:
    needed: set[fx.Node] = {node}
    for candidate in reversed(site.covered):
        if candidate in needed:
            needed.update(candidate.all_input_nodes)
    return tuple(n for n in site.covered if n in needed)


def _delay_outputs(graph: fx.Graph, promised: list, new: dict[fx.Node, fx.Node]) -> list[LazyOutput]:
    if not promised:
        return []
    output = graph.find_nodes(op="output")[0]
    results = list(output.args[0])
    inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    delayed = {promise.result: promise for promise in promised}
    kept = [r for r in results if r not in delayed]
    count = len(kept)
    lazy = []
    for index, result in enumerate(results):
        if result not in delayed:
            continue
        promise = delayed[result]
        sources = []
        dtypes = tuple(tensor_meta(n).dtype for n in promise.inputs)
        for node in promise.inputs:
            node = new.get(node, node)
            if node in inputs:
                sources.append(("input", inputs[node]))
                continue
            if node not in kept:
                kept.append(node)
            sources.append(("output", kept.index(node)))
        meta, ambient = tensor_meta(result), result.meta.get("ambient")
        made_of = tuple(sources), meta, ambient, dtypes, promise.rows, promise.hooks
        lazy.append(LazyOutput(index, count, promise.module, *made_of))
    output.args = (tuple(kept),)
    return lazy


def _rows(site: Site, module: fx.GraphModule) -> int | None:
    """The place among a site's inputs of what goes into a head, if its rows are treated each by itself."""
    row_input = site.matches[0].pattern.row_input(site.matches[0])
    own = {n.target for n in module.graph.nodes if n.op == "call_function"}
    return site.inputs.index(row_input) if row_input in site.inputs and own <= _ROW_BY_ROW else None


_aten = torch.ops.aten
_ROW_BY_ROW = {
    _aten.linear.default, _aten.matmul.default, _aten.t.default, _aten.transpose.int, _aten.mul.Tensor,
    _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar, _aten.tanh.default, _aten.add.Tensor, _aten.to.dtype,
    _aten._to_copy.default, _aten.alias.default, _aten.contiguous.default,
}  # fmt: skip
