"""From graph nodes to module paths."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import CodeType

from torch import fx

_FRAME = re.compile(r'File "(.*)", line (\d+), in (.*)')
_PIECE = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")


def node_path(node: fx.Node, base: str, path_of: Callable[[int], str | None]) -> str:
    """The path of the module whose forward made a node; `base` for a node of the region's own forward."""
    stack = node.meta.get("nn_module_stack") or {}
    for key, (source, _) in reversed(list(stack.items())):
        digits = str(key).partition("@")[0]
        path = path_of(int(digits)) if digits.isdigit() else None
        if path is not None:
            return path
        if isinstance(source, str) and source.startswith("L["):
            return _from_source(source, base)
    return base


def _from_source(source: str, base: str) -> str:
    """`L['self'].layers[0]._modules['norm']` -> base + `layers.0.norm`."""
    text = source.partition("]")[2]
    text = _PIECE.sub(r".\1", text).replace("._modules.", ".").strip(".")
    return ".".join(p for p in (base, text) if p)


def outer_frame_is(code: CodeType, stack_trace: str) -> bool:
    """Whether the outermost frame of a node's stack trace ran this code, or what Dynamo made of the rest of it."""
    if (found := _FRAME.search(stack_trace)) is None or found[1] != code.co_filename:
        return False
    lines = [line for _, _, line in code.co_lines() if line is not None]
    name = re.sub(r"^torch_dynamo_resume_in_(.*)_at_\d+$", r"\1", found[3])
    return name == code.co_name and min(lines) <= int(found[2]) <= max(lines)


def site_path(
    outputs: tuple[fx.Node, ...], covered: tuple[fx.Node, ...], base: str, whole: bool, path_of: Callable
) -> str:
    """Where a site is: the module of its result, or, where that is the `whole` model, of its nearest operator."""
    paths = [node_path(node, base, path_of) for node in (*outputs[:1], *reversed(covered))]
    return next((p for p in paths if p != base), base) if whole else paths[0]
