"""Traced spellings of the built-in patterns on disk: tracing the hundreds that a model may need takes seconds.

They depend on the package's own sources and on torch alone, of which the file's name is a hash. A file that can't be
read, written or understood is as good as none.
"""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from rewriter import cache
from rewriter.log import log
from rewriter.pattern import Pattern, Reference, TracedReference

_FIELD = "traced"  # where functools.cached_property keeps Reference.traced
_stored: set[str] = set()  # names of those that this process has read or written


def restore(patterns: Mapping[str, Pattern]) -> None:
    """Give references what an earlier process has traced of them."""
    found = _read()
    for name, reference in _named(patterns):
        if name in found:
            reference.__dict__[_FIELD] = found[name]
            _stored.add(name)


def keep(patterns: Mapping[str, Pattern]) -> None:
    """Store what was traced since `restore` or the last call."""
    new = {n: r.__dict__[_FIELD] for n, r in _named(patterns) if n not in _stored and _FIELD in r.__dict__}
    file = _file()
    if not new or file is None:
        return
    _stored.update(new)
    try:
        content = io.BytesIO()
        _Pickler(content, protocol=pickle.HIGHEST_PROTOCOL).dump({**_read(), **new})
        cache.write(file, content.getvalue())
        _leave_newest(file.parent)
    except Exception as error:
        log.debug("traced spellings are not stored: %s: %s", type(error).__name__, error)


def _leave_newest(folder: Path, number: int = 8) -> None:
    """Remove what was stored of sources and versions that have been replaced since."""
    files = sorted(folder.glob("*.pickle"), key=lambda file: file.stat().st_mtime)
    for file in files[:-number]:
        file.unlink(missing_ok=True)


def _named(patterns: Mapping[str, Pattern]) -> Iterator[tuple[str, Reference]]:
    for name, pattern in patterns.items():
        for place, references in {"": pattern.references, **pattern.within}.items():
            yield from ((f"{name} {place} {i}", reference) for i, reference in enumerate(references))


def _read() -> dict[str, TracedReference]:
    file = _file()
    if file is None:
        return {}
    try:
        with file.open("rb") as opened:
            found = _Unpickler(opened).load()
    except Exception as error:  # a pickle can fail in any way
        log.debug("no stored spellings: %s: %s", type(error).__name__, error)
        return {}
    return found if isinstance(found, dict) else {}


@functools.cache
def _file() -> Path | None:
    """None where the sources can't be read."""
    from rewriter import canonical, kernels, patterns

    digest = hashlib.sha256(f"{torch.__version__} {sys.version}".encode())
    try:
        for folder in (Path(__file__).parent, *(Path(p.__path__[0]) for p in (canonical, kernels, patterns))):
            for source in sorted(folder.glob("*.py")):
                text = source.read_bytes()
                digest.update(f"{folder.name}/{source.name} {len(text)}\0".encode() + text)
        return cache.directory() / "spellings" / f"{digest.hexdigest()}.pickle"
    except (OSError, RuntimeError):
        return None


class _Pickler(pickle.Pickler):
    """Without the nodes of the graphs that were traced, which no match reads."""

    def persistent_id(self, value: Any) -> str | None:
        return "node" if isinstance(value, fx.Node) else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, name: str) -> None:
        return None
