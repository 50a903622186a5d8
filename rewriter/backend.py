"""The torch.compile backend: (GraphModule, example inputs) -> callable.

lower -> rewrite -> execute. Whatever goes wrong on the way, the graph runs as Dynamo captured it, and the report says
so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from rewriter.execute import execute, resolve, with_checkpoints
from rewriter.lazy import LazyTensor, lazy_rows
from rewriter.lazy_rows import Head, Rows
from rewriter.library import chosen
from rewriter.log import log
from rewriter.lower import Lowering
from rewriter.meta import tensor_meta
from rewriter.normalise import normalise
from rewriter.own_loss import CASTS, PRODUCTS, SCALINGS, TURNS
from rewriter.replace import LazyOutput
from rewriter.rewrite import Result, rewrite
from rewriter.session import Options, RewriteError, Session
from rewriter.sources import Sources


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
        record = session.record(result, gm.graph, code)
        misses = [m for m in record.misses if not m.choice]
        if options.strict and (misses or target is gm):
            reasons = "; ".join(f"{m.pattern} at {', '.join(m.sites) or '<model>'}: {m.reason}" for m in misses)
            raise RewriteError(f"not everything was rewritten: {reasons or 'see the report'}")
        if options.dry:
            with_checkpoints(gm)
            return _noting(gm.forward, session, record)
        empty = not any(n.op.startswith("call") for n in target.graph.nodes)  # its outputs are all made on demand
        run = target.forward if empty else execute(target, example_inputs, executor)
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

    def compute(values: list[torch.Tensor]) -> torch.Tensor:
        casts = dict(ambient[1])
        cast = torch.autocast(device.type, dtype=casts.get(device.type), enabled=device.type in casts)
        with torch.set_grad_enabled(grad), cast:
            return spec.module(*values)[0]

    shape, sources = spec.shape_of(tuple(tuple(v.shape) for v in values)), Sources(values)
    if spec.rows is not None and shape[:-1] == tuple(values[spec.rows].shape[:-1]):
        rows = Rows(sources, spec.rows, compute, shape, spec.meta.dtype, device, grad)
        rows = dataclasses.replace(rows, head=_head(spec, dict(ambient[1]).get(device.type), values))
        return lazy_rows(rows, hooks=spec.hooks)
    return LazyTensor(compute, sources, shape, spec.meta.dtype, device, grad, hooks=spec.hooks)


def _head(spec: LazyOutput, matmul_dtype: torch.dtype | None, values: list) -> Head | None:
    """What a loss of it can be fused with: a linear layer in one dtype, maybe scaled and capped by numbers."""
    graph = spec.module.graph
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    product, *steps = [n for n in graph.nodes if n.op == "call_function" and n.target not in TURNS]
    if product.target not in PRODUCTS or product.kwargs or places.get(product.args[0]) != spec.rows:
        return None
    x, weight, *bias = (a for a in product.args if a is not None)
    transposed = product.target is aten.matmul.default and weight in places
    if weight not in places:
        weight = weight.args[0]
    if steps and steps[0].target is aten.add.Tensor and steps[0].args[0] is product:
        product, *steps = steps
        bias.append(product.args[1])
    before, after, capped, last = 1.0, 1.0, False, product
    for step in steps:
        if step.args[0] is not last:
            return None
        number, last = (step.args[1] if len(step.args) == 2 else None), step
        if step.target in CASTS:
            if not _widens(step):
                return None
        elif step.target is aten.tanh.default:
            if capped:
                return None
            capped = True
        elif step.kwargs or step.target not in SCALINGS or not isinstance(number, int | float) or not number > 0:
            return None
        else:
            factor = 1 / number if step.target in (aten.div.Tensor, aten.div.Scalar) else number
            before, after = (before, after * factor) if capped else (before * factor, after)
    places = [places.get(node) for node in (x, weight, *bias)]
    if None in places or (len({values[i].dtype for i in places}) > 1 and matmul_dtype is None):
        return None
    _, weight, *bias = places
    scale, cap = before * after, after if capped else None
    return Head(weight, bias[0] if bias else None, matmul_dtype, scale, cap, transposed)


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
