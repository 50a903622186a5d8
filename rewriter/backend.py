"""The torch.compile backend: (GraphModule, example inputs) -> callable.

lower -> rewrite -> execute. Whatever goes wrong on the way, the graph runs as Dynamo captured it, and the report says
so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from rewriter import spellings
from rewriter.execute import execute, resolve, with_checkpoints
from rewriter.head_graph import CASTS, factor_of, head_graph
from rewriter.lazy import LazyTensor, lazy_rows
from rewriter.lazy_rows import Head, Rows
from rewriter.library import built_in, chosen
from rewriter.log import log
from rewriter.lower import Lowering
from rewriter.meta import tensor_meta
from rewriter.normalise import normalise
from rewriter.replace import LazyOutput
from rewriter.rewrite import Result, rewrite
from rewriter.session import Options, RewriteError, Session
from rewriter.sources import Sources
from rewriter.subgraph import extract


class Backend:
    """One per optimised model: Dynamo shares compiled graphs only between regions with the same backend object."""

    def __init__(self, session: Session):
        self.session = session
        self._lowering = Lowering()

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable:
        session, options = self.session, self.session.options
        executor = resolve(options.executor, _device_type(example_inputs))
        code = _code_of(gm)
        try:
            with _own_saved_tensors():
                target, result = self.rewritten(gm)
        except Exception as error:  # never break a training run: the captured graph is still there
            log.warning("a graph is left as it was: %s: %s", type(error).__name__, error, exc_info=True)
            session.fallback(session.running(), f"graph left as it was: {type(error).__name__}: {error}")
            target, result = gm, Result()
        spellings.keep(built_in())
        record = session.record(result, gm.graph, code)
        misses = [m for m in record.misses if not m.choice]
        if options.strict and (misses or target is gm):
            reasons = "; ".join(f"{m.pattern} at {', '.join(m.sites) or '<model>'}: {m.reason}" for m in misses)
            raise RewriteError(f"not everything was rewritten: {reasons or 'see the report'}")
        if options.dry:
            with_checkpoints(gm)
            return _noting(gm.forward, session, record)
        empty = not any(n.op.startswith("call") for n in target.graph.nodes)  # its outputs are all made on demand
        made_again = record.made_again.update if options.make_again else None
        run = target.forward if empty else execute(target, example_inputs, executor, made_again)
        if result.lazy:
            run = with_lazy_outputs(run, result.lazy)
        return _noting(run, session, record)

    def rewritten(self, gm: fx.GraphModule, whole: bool = True) -> tuple[fx.GraphModule, Result]:
        """The lowered and rewritten copy of a Dynamo graph; bodies of checkpointed calls included.

        whole: not such a body, whose outputs go on in a graph, where none can be computed on demand.
        """
        lowered = self._lowering(gm)
        normalise(lowered.graph)
        session = self.session
        leaves = self._ends(gm) if whole else None
        patterns, selection = session.options.patterns, session.selection
        result = rewrite(lowered, patterns, session.proofs, session.fuel, whole, leaves, selection)
        for node in lowered.graph.nodes:
            if node.op == "get_attr" and isinstance(getattr(lowered, node.target, None), fx.GraphModule):
                if any(u.target is torch._higher_order_ops.wrap.tag_activation_checkpoint for u in node.users):
                    body, inner = self.rewritten(getattr(lowered, node.target), whole=False)
                    setattr(lowered, node.target, body)
                    result.applied += inner.applied
                    result.kept += inner.kept
                    result.refused += inner.refused
        return lowered, result

    def _ends(self, gm: fx.GraphModule) -> Callable[[fx.Node], bool] | None:
        """What tells of a node whether the outermost forward ends with this graph, if it does at all.

        Dynamo says whether it goes on behind the graph; a forward that it had to leave runs others with graphs of
        their own, so the node must have been captured in that very function.
        """
        reason = getattr(gm, "compile_subgraph_reason", None)
        if reason is None or reason.graph_break:
            return None
        return self.session.is_outermost


def _own_saved_tensors() -> contextlib.AbstractContextManager:
    """Keep what is traced here away from the hooks of a checkpoint that the model is running in: it counts tensors.

    Needed with torch 2.11, where they are called for what a backend runs; 2.13 passes the same tests without.
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _noting(run: Callable, session: Session, record: Any) -> Callable:
    def call(*args: Any) -> Any:
        session.note_run(record)
        return run(*args)

    return call


def _code_of(gm: fx.GraphModule) -> Any:
    """What tells one captured function from another: recompilations of it have the same."""
    with contextlib.suppress(Exception):
        context = torch._guards.TracingContext.try_get()
        info = torch._guards.CompileContext.current_compile_id()
        if context is not None and info is not None:
            return info.frame_id
    return id(gm)


def _device_type(example_inputs: list[Any]) -> str:
    for value in example_inputs:
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return value.device.type
    return "cpu"


def with_lazy_outputs(run: Callable, lazy: list[LazyOutput]) -> Callable:
    """Put the outputs that the graph no longer computes back in their places, as tensors computed on demand."""

    def call(*args: Any) -> tuple:
        results = list(run(*args))
        if torch._C._are_functorch_transforms_active():  # which can't see what is done later
            return tuple(_at_once(results, args, lazy))
        kept = results[: lazy[0].kept]
        for spec in lazy:  # in order of their places
            kept.insert(spec.index, _lazy_tensor(spec, args, results))
        return tuple(kept)

    return call


def _at_once(results: list, args: tuple, lazy: list[LazyOutput]) -> list:
    kept = results[: lazy[0].kept]
    for spec in lazy:
        kept.insert(spec.index, _lazy_tensor(spec, args, results).materialize())
    return kept


def _lazy_tensor(spec: LazyOutput, args: tuple, results: list) -> LazyTensor:
    values = [args[i] if kind == "input" else results[i] for kind, i in spec.sources]
    grad = torch.is_grad_enabled() and spec.meta.requires_grad
    ambient = spec.ambient or (True, ())
    device = next(v.device for v in values if isinstance(v, torch.Tensor))

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        casts = dict(ambient[1])
        cast = torch.autocast(device.type, dtype=casts.get(device.type), enabled=device.type in casts)
        with torch.set_grad_enabled(grad), cast:
            yield

    def compute(values: list[torch.Tensor]) -> torch.Tensor:
        with inside():
            return spec.module(*values)[0]

    shape, sources = spec.shape_of(tuple(tuple(v.shape) for v in values)), Sources(values)
    if spec.rows is not None and shape[:-1] == tuple(values[spec.rows].shape[:-1]):
        rows = Rows(sources, spec.rows, compute, shape, spec.meta.dtype, device, grad)
        rows = dataclasses.replace(rows, head=_head(spec, dict(ambient[1]).get(device.type), values, inside))
        return lazy_rows(rows, hooks=spec.hooks)
    return LazyTensor(compute, sources, shape, spec.meta.dtype, device, grad, hooks=spec.hooks)


def _head(spec: LazyOutput, matmul_dtype: torch.dtype | None, values: list, inside: Callable) -> Head | None:
    """What a loss of it can be fused with: a head in one dtype, maybe scaled and capped by numbers.

    inside: a context with the grad mode and autocast that the model has there
    """
    if "head" not in spec.parts:
        spec.parts["head"] = _parts(spec)
    found = spec.parts["head"]
    if found is None:
        return None
    weight, bias, transposed, scale, cap, adapter = found
    own = [spec.rows, weight, *([] if bias is None else [bias])]
    if len({values[i].dtype for i in own}) > 1 and matmul_dtype is None:
        return None

    def branch(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        first, ups = adapter
        with inside():
            u = [z.to(matmul_dtype or z.dtype) * s for z, (_, _, s) in zip(first(*values), ups, strict=True)]
            up = [values[i].t() if by_columns else values[i] for i, by_columns, _ in ups]
            return (u[0], up[0]) if len(u) == 1 else (torch.cat(u, -1), torch.cat(up, 1))

    return Head(weight, bias, matmul_dtype, scale, cap, transposed, None if adapter is None else branch)


def _parts(spec: LazyOutput) -> tuple | None:
    """(places of weight and maybe bias, whether the weight is by columns, scale, maybe cap, adapter) or None.

    adapter: None, or (module of all sources that gives what each first matrix does, [(place of the second, whether that
    is by columns, scale)])
    """
    graph = spec.module.graph
    inputs = graph.find_nodes(op="placeholder")
    places = {node: i for i, node in enumerate(inputs)}
    (output,) = graph.find_nodes(op="output")
    head = head_graph(output.args[0][0], lambda node, dims: places.get(node, spec.rows) != spec.rows)
    if head is None or places.get(_plain(head.product.x)) != spec.rows:
        return None
    before, after, capped = 1.0, 1.0, False
    for i, step in enumerate(head.steps):
        if step.target in CASTS:
            if not _widens(step) and not (i == 0 and head.branches and _is_back_to(step, head.product.nodes[0])):
                return None
        elif step.target is aten.tanh.default:
            if capped:
                return None
            capped = True
        elif (factor := factor_of(step)) > 0:
            before, after = (before, after * factor) if capped else (before * factor, after)
        else:
            return None
    weight, bias = places[head.product.weight], places.get(head.product.bias)
    adapter = None
    if head.branches:
        firsts = tuple(branch.first for branch in head.branches)
        nodes = tuple(n for n in graph.nodes if n.op == "call_function")
        first = extract(tuple(inputs), _needed(firsts, nodes), firsts)
        adapter = first, [(places[b.up], b.by_columns, b.scale) for b in head.branches]
    return weight, bias, head.product.by_columns, before * after, after if capped else None, adapter


def _plain(node: fx.Node) -> fx.Node:
    """What another name stands for."""
    while node.target is torch.ops.aten.alias.default:
        node = node.args[0]
    return node


def _needed(results: tuple[fx.Node, ...], nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Those of some nodes, in order, that results are made of."""
    needed = set(results)
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return tuple(n for n in nodes if n in needed)


def _is_back_to(step: fx.Node, product: fx.Node) -> bool:
    """Whether a cast gives the sum with adapters the dtype of the head's product again."""
    before, after = tensor_meta(product), tensor_meta(step)
    return None not in (before, after) and before.dtype is after.dtype


def _widens(step: fx.Node) -> bool:
    """Whether a cast only adds digits, which a loss in float32 does anyway. Where dtypes aren't known, it doesn't."""
    before, after = tensor_meta(step.args[0]), tensor_meta(step)
    return None not in (before, after) and torch.promote_types(before.dtype, after.dtype) == after.dtype


aten = torch.ops.aten


@functools.cache
def _default_backend() -> Backend:
    options = Options(chosen(None, ()), executor="auto", dynamic=None, verify="first", strict=False)
    return Backend(Session(None, options))


def default_session() -> Session:
    """The session behind `torch.compile(..., backend="rewriter")`."""
    return _default_backend().session


def rewriter_backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable:
    """Registered as torch.compile(backend="rewriter"). Built-in and plugin patterns, executor by device."""
    return _default_backend()(gm, example_inputs)
