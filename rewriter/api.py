"""The public calls: optimize, report, explain, restore."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from rewriter import settings
from rewriter.attach import (
    attach,
    attached,
    codes_of,
    detach,
    opaque_forward,
    region_forward,
    replaced_by,
    traceable,
)
from rewriter.backend import Backend, default_session
from rewriter.execute import EXECUTORS
from rewriter.library import chosen
from rewriter.pattern import Pattern
from rewriter.regions import Region, find_regions
from rewriter.report import RewriteReport
from rewriter.select import MEMORY_RATE, MODES
from rewriter.session import Options, Session

_SESSION = "_rewriter_session"
_VERIFY = ("first", "off")


def optimize(
    model: nn.Module,
    *,
    patterns: Iterable[str | Pattern] | None = None,
    exclude: Iterable[str] = (),
    executor: str = "auto",
    dynamic: bool | None = None,
    verify: str = "first",
    strict: bool = False,
    select: str = "shipped",
    memory_rate: float = MEMORY_RATE,
) -> nn.Module:
    """Make training of `model` faster and smaller, in place; the same object comes back.

    Nothing is compiled yet: the first training step captures the model, proves each rewrite and installs it. Keys of
    the state dict, hooks, `generate`, saving, copying and gradient checkpointing stay as they are.

    patterns: names restrict the built-in patterns to these; Pattern objects are added (one named like a built-in
              pattern takes its place). Default: all built-in ones and those of installed plugins
    exclude:  names of patterns that are not applied; "made_again": keep for backward what its kernels could write again
    executor: "eager" runs the rewritten graph as it is, "inductor" compiles it further, "auto" is Inductor on an
              accelerator and eager on a CPU
    dynamic:  as in torch.compile: None lets a second shape become dynamic, True starts so, False never
    verify:   "first" proves each distinct match once, in values and gradients, before it is used; "off" trusts patterns
              (but for a backward that the model itself has written: what it does, only a proof can tell)
    strict:   raise RewriteError where something that looks like a pattern was not rewritten, but for what could be
              rewritten and does not pay
    select:   "shipped" leaves a place as it was where the table in rewriter/decisions.py says that a rewrite does not
              pay; "measure" times each distinct place and its rewrite, forward and backward, on the device, in the
              first step, and keeps the better one; "all" rewrites whatever is right
    memory_rate: with "measure", how many milliseconds a GiB is worth that need not wait for backward (at least 0)

    Raises TypeError for a model that is no nn.Module or an argument of the wrong type, ValueError for an unknown
    pattern, executor or mode or a negative memory_rate, and for a model with parameters on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize takes a torch.nn.Module, not {type(model).__name__}")
    options = _options(patterns, exclude, executor, dynamic, verify, strict, select, memory_rate)
    _refuse_meta(model)
    _install(model, options)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize`: afterwards the model is exactly what it was. A model that isn't optimised is left alone."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore takes a torch.nn.Module, not {type(model).__name__}")
    for module in model.modules():
        detach(module)
        module.__dict__.pop(_SESSION, None)
    return model


def report(model: nn.Module) -> RewriteReport:
    """What has been rewritten so far; complete after the first training step.

    Raises ValueError for a model that was not optimised (nor compiled with backend="rewriter").
    """
    session = _session(model)
    if session is None:
        raise ValueError("this model was not optimised: call rewriter.optimize(model) first")
    ran = {record.kind for record in session.graphs}
    if ran and "model" not in ran:
        for module in model.modules():
            mark, other = attached(module), replaced_by(module)
            if mark is not None and session.kinds.get(mark.path) == "model" and other:
                session.note(f"{other} took the place of the outermost forward: head and loss run as that has them")
    return session.report()


def explain(model: nn.Module, **options: Any) -> Callable[..., RewriteReport]:
    """A dry run: `explain(model)(**batch)` runs one forward and reports what `optimize` would do.

    The model is untouched: its own code runs, parameters, buffers, gradients, random state and attachments stay.
    Takes the options of `optimize`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain takes a torch.nn.Module, not {type(model).__name__}")
    arguments = {n: p.default for n, p in inspect.signature(optimize).parameters.items() if p.kind is p.KEYWORD_ONLY}
    unknown = set(options) - set(arguments)
    if unknown:
        raise TypeError(f"explain has no option {sorted(unknown)[0]!r}; allowed are {', '.join(arguments)}")
    checked = _options(**{**arguments, **options}, dry=True)
    _refuse_meta(model)

    def run(*args: Any, **kwargs: Any) -> RewriteReport:
        before = [(m, dict(m.__dict__)) for m in model.modules() if "forward" in m.__dict__ or _SESSION in m.__dict__]
        buffers = [(b, b.detach().clone()) for b in model.buffers()]
        restore(model)
        devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        try:
            session = _install(model, checked)
            with torch.random.fork_rng(devices), torch.enable_grad():
                model(*args, **kwargs)
            return session.report()
        finally:
            restore(model)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module, attributes in before:
                module.__dict__.update({k: v for k, v in attributes.items() if k not in module.__dict__})

    return run


def _options(
    patterns: Any,
    exclude: Any,
    executor: Any,
    dynamic: Any,
    verify: Any,
    strict: Any,
    select: Any,
    memory_rate: Any,
    dry: bool = False,
) -> Options:
    if executor not in EXECUTORS:
        raise ValueError(f"unknown executor {executor!r}; allowed are {', '.join(EXECUTORS)}")
    if verify not in _VERIFY:
        raise ValueError(f"unknown verify mode {verify!r}; allowed are {', '.join(_VERIFY)}")
    if dynamic not in (None, True, False):
        raise TypeError("dynamic is None, True or False")
    if select not in MODES:
        raise ValueError(f"unknown select mode {select!r}; allowed are {', '.join(MODES)}")
    if isinstance(memory_rate, bool) or not isinstance(memory_rate, int | float):
        raise TypeError(f"memory_rate is a number of milliseconds for each GiB, not {type(memory_rate).__name__}")
    if not 0 <= memory_rate < math.inf:
        raise ValueError(f"memory_rate is at least 0 and finite, not {memory_rate}")
    exclude = exclude if isinstance(exclude, str) else tuple(exclude)
    return Options(
        chosen(patterns, exclude), executor, dynamic, verify, bool(strict), dry, select, float(memory_rate),
        make_again="made_again" not in exclude,
    )  # fmt: skip


def _refuse_meta(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"parameter {name} is on the meta device: load the weights before the model is optimised")


def _session(model: Any) -> Session | None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"report takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        return default_session()
    for module in model.modules():  # a wrapper may have been put around an optimised model, or taken off
        if module.__dict__.get(_SESSION) is not None:
            return module.__dict__[_SESSION]
        if attached(module) is not None:
            return attached(module).session
    return None


def _sizes(module: nn.Module) -> tuple:
    """Modules that differ in this are never instances of one graph, whatever their class."""
    return tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _install(model: nn.Module, options: Options) -> Session:
    present = model.__dict__.get(_SESSION)
    if present is not None and present.options == options:
        return present
    restore(model)
    settings.apply()
    session = Session(model, options)
    backend = Backend(session)
    model.__dict__[_SESSION] = session
    shared: dict[Any, Callable] = {}

    def install(region: Region) -> None:
        session.kinds[region.path] = region.kind

        def wrap(forward: Callable) -> Callable:
            kind = region.kind
            if kind == "body":
                return opaque_forward(forward, session)
            key = forward, kind, _sizes(region.module)
            if key not in shared:
                number = sum(known[:2] == key[:2] for known in shared)
                entry = traceable(forward, number)
                compiled = torch.compile(entry, backend=backend, dynamic=options.dynamic)
                if kind == "model":
                    session.outermost = codes_of(entry)
                shared[key] = region_forward(forward, compiled, session, kind)
            return shared[key]

        attach(region, wrap, session)

    def compile_inlined_blocks() -> None:
        for region in inlined:
            install(dataclasses.replace(region, kind="block"))

    regions = find_regions(model)
    session.order = {region.path: i for i, region in enumerate(regions)}
    inlined = [r for r in regions if r.kind == "inlined"]
    for region in regions:
        if region.kind != "inlined":
            install(region)
    if len(inlined) > 1:
        session.inlined = tuple(region.path for region in inlined)
        session.when_in_pieces = compile_inlined_blocks
    return session
