"""Put compiled forwards on module instances, and take them off again.

The forward is an instance attribute, a bound method: direct `m.forward(...)` calls, hooks, `inspect.signature`,
deepcopy and pickling work as before. Everything needed to undo it lies on the module itself, so copies can be restored
too.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewriter import context
from rewriter.regions import Region

_MARK = "_rewriter_attachment"
_REPLICATE = "_replicate_for_data_parallel"
REASON = "region of rewriter"


@dataclass(frozen=True)
class Attachment:
    """Left on a module: its path in the optimised model, the instance-level forward before ours, and ours."""

    path: str
    previous: Callable | None
    forward: Callable
    session: Any

    def __deepcopy__(self, memo: dict) -> Attachment:
        return Attachment(self.path, copy.deepcopy(self.previous, memo), self.forward, self.session)

    def __reduce__(self) -> Any:
        return (_nothing, ())  # an unpickled model is a plain one: bound methods are looked up on its class


def attached(module: nn.Module) -> Attachment | None:
    return module.__dict__.get(_MARK)


def replaced_by(module: nn.Module) -> str:
    """Name of the forward that somebody put over ours, or an empty text."""
    mark, forward = attached(module), module.__dict__.get("forward")
    inner = getattr(forward, "__func__", forward)
    if mark is None or inner is None or inner is mark.forward:
        return ""
    while isinstance(inner, functools.partial):
        inner = inner.func
    code = getattr(inner, "__code__", None)  # its names are often those of the forward it wraps
    place = getattr(inner, "__globals__", {}).get("__name__", "")
    return f"{place}.{code.co_name}" if code is not None else type(inner).__name__


def attach(region: Region, wrap: Callable[[Callable], Callable], session: Any) -> None:
    """Give the region's module the forward `wrap(unbound forward)`."""
    module = region.module
    previous = module.__dict__.get("forward")
    if getattr(previous, "__func__", None) is type(module).forward:
        previous = None  # left by unpickling: a bound method of the class is what the class gives anyway
    forward = types.MethodType(wrap(_unbound(module, previous)), module)
    module.__dict__.update({"forward": forward, _REPLICATE: types.MethodType(_replicate_for_data_parallel, module)})
    module.__dict__[_MARK] = Attachment(region.path, previous, forward.__func__, session)


def detach(module: nn.Module) -> bool:
    """Undo `attach`; whether there was anything to undo.

    A forward that somebody put over ours stays: ours, still inside it, then only passes the call on.
    """
    attachment = module.__dict__.pop(_MARK, None)
    module.__dict__.pop(_REPLICATE, None)
    if attachment is None:
        return False
    if getattr(module.__dict__.get("forward"), "__func__", None) is not attachment.forward:
        return True
    if attachment.previous is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = attachment.previous
    return True


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """nn.DataParallel copies `__dict__`, bound methods too: a replica must run its own forward, not the original's."""
    replica = type(self)._replicate_for_data_parallel(self)
    replica.__dict__.pop("forward", None)
    return replica


def _nothing() -> None:
    return None


def _unbound(module: nn.Module, previous: Callable | None) -> Callable:
    if previous is None:
        return type(module).forward
    if isinstance(previous, types.MethodType) and previous.__self__ is module:
        return previous.__func__

    @functools.wraps(previous)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return previous(*args, **kwargs)

    return forward


def opaque_forward(forward: Callable, session: Any) -> Callable:
    """A forward that Dynamo calls without looking inside; regions below it compile for themselves.

    A body whose forward takes `use_cache` builds a cache in training too unless it is told otherwise. Nobody reads it
    there, but each block writes to its own entry, so no two blocks could share a graph: where the caller says nothing,
    a training step runs without one, and the report notes it.
    """
    parameters = list(inspect.signature(forward).parameters)
    place = parameters.index("use_cache") if "use_cache" in parameters else None

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if place is not None and torch.is_grad_enabled() and len(args) < place and attached(self):
            if kwargs.get("use_cache") is None and kwargs.get("past_key_values") is None:
                kwargs["use_cache"] = False
                session.note("training steps run with use_cache=False: their outputs carry no past_key_values")
        return forward(self, *args, **kwargs)

    return torch.compiler.disable(run, recursive=True, reason=REASON)


def region_forward(forward: Callable, compiled: Callable, session: Any, kind: str) -> Callable:
    """The forward of a compiled region: `compiled`, or `forward` itself where compiling has no purpose."""

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mark = attached(self)
        if mark is None or not session.wants(kind, mark.path, args, kwargs):
            return forward(self, *args, **kwargs)
        session.about_to_run(kind)
        frame = context.push(mark.path)
        try:
            result = compiled(self, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            # Not ours to pass on: the model's own code may well run, and says better what is wrong if it doesn't.
            session.give_up(mark.path, error)
            return forward(self, *args, **kwargs)
        finally:
            context.pop()
        session.ran(frame, kind)
        return result

    return torch.compiler.disable(run, recursive=True, reason=REASON)


def codes_of(forward: Callable) -> list[types.CodeType]:
    """Code of a forward and of what it was wrapped around, where `functools.wraps` tells."""
    codes = []
    while forward is not None:
        if (code := getattr(forward, "__code__", None)) is not None:
            codes.append(code)
        forward = getattr(forward, "__wrapped__", None)
    return codes


def traceable(forward: Callable, number: int) -> Callable:
    """`forward` as Dynamo accepts it for an outermost frame: it skips frames whose code lies in torch.nn itself.

    Dynamo keeps sizes that changed, and counts recompilations, by code: with another number it is code of its own, so
    that one module's width is not taken for another's that changed.
    """
    inner = forward
    if getattr(forward, "__module__", "").startswith("torch."):

        def enter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        inner = enter
    elif not number or not isinstance(forward, types.FunctionType):
        return forward
    name = f"{getattr(forward, '__qualname__', 'forward').replace('.', '_')}_{number}"
    code = inner.__code__.replace(co_name=name)
    copied = types.FunctionType(code, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__)
    copied.__kwdefaults__ = inner.__kwdefaults__
    return functools.update_wrapper(copied, forward)
