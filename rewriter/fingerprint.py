"""What a measurement depends on besides the match: sources of its pattern and kernels, versions, device, settings."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from rewriter.environment import environment

_VERSIONS = ("rewriter", "torch", "triton")


def sources(things: Iterable[Any]) -> str | None:
    """A hash of the files that hold these classes and functions, and of all that those import of their own packages.

    Of rewriter itself, patterns and kernels alone count: the compiler around them does not change what they take.
    None where a file can't be read: a function that was typed in, say.
    """
    modules = sorted({_module(thing) for thing in things} - {"torch"})
    roots = {_package(name) for name in modules}
    done: dict[str, bytes] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name in done:
            continue
        text = _text(name)
        if text is None:
            return None
        done[name] = text
        found = {n for n in _imports(name, text) if _package(n) in roots and _counts(n)}
        todo += [n for n in found if n not in done and _is_module(n)]
    digest = hashlib.sha256()
    for name in sorted(done):
        digest.update(f"{name}\0{len(done[name])}\0".encode())
        digest.update(done[name])
    return digest.hexdigest()


def surroundings(device: torch.device) -> dict[str, str]:
    """Versions, device and the global settings that change how long an operator takes."""
    versions = {name: text for name, text in environment().items() if name in _VERSIONS}
    return versions | {
        "device": _device(device),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count}"
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, UnicodeDecodeError, StopIteration):
        return platform.processor() or platform.machine()


def _module(thing: Any) -> str:
    """The module of a class or function; of a class method, that of its class. What is torch's goes by its version."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    owner = getattr(thing, "__self__", None)
    name = getattr(owner if isinstance(owner, type) else thing, "__module__", None) or ""
    return "torch" if _package(name) == "torch" or isinstance(thing, torch._ops.OpOverload) else name


def _package(name: str) -> str:
    return name.partition(".")[0]


def _counts(name: str) -> bool:
    return not name.startswith("rewriter") or name.startswith(("rewriter.patterns.", "rewriter.kernels."))


def _text(name: str) -> bytes | None:
    """The file of a module; read anew each time, as a program may have changed its own files since it began."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if module is None:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return None
        file = spec.origin if spec is not None else None
    try:
        return Path(file).read_bytes() if file is not None else None
    except OSError:
        return None


def _imports(name: str, text: bytes) -> Iterator[str]:
    """Names that a file imports, anywhere in it: modules, and what may be one."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                module = sys.modules.get(name)
                package = name if hasattr(module, "__path__") else name.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}".strip(".")
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def _is_module(name: str) -> bool:
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) is not None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return False
    return spec is not None and spec.has_location
