"""The patterns that apply: built-in ones, those of installed plugins, and those given to `optimize`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points

from rewriter import spellings
from rewriter.log import log
from rewriter.pattern import Pattern, usual_settings

BUILT_IN = (
    "linear_cross_entropy",
    "cross_entropy",
    "attention",
    "add_rms_norm",
    "add_layer_norm",
    "rms_norm",
    "layer_norm",
    "rotary",
    "glu",
    "lora",
    "linear_4bit",
)
PASSES = ("made_again",)  # what else `exclude` may name: see rewriter/made_again.py
ENTRY_POINTS = "rewriter.patterns"


@functools.cache
def built_in() -> dict[str, Pattern]:
    """Name -> pattern, each from the module of its name under rewriter.patterns."""
    with usual_settings():  # patterns hold tensors
        found = {name: importlib.import_module(f"rewriter.patterns.{name}").PATTERN for name in BUILT_IN}
    spellings.restore(found)
    return found


@functools.cache
def plugins() -> dict[str, Pattern]:
    """Patterns of installed packages (entry points of group `rewriter.patterns`); a broken one is left out."""
    found = {}
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            loaded = entry.load()
            pattern = loaded() if isinstance(loaded, type) else loaded
            _check(pattern)
            found[pattern.name] = pattern
        except Exception as error:  # somebody else's package must not stop a training run
            log.warning("pattern plugin %r can't be loaded: %s: %s", entry.name, type(error).__name__, error)
    return found


def chosen(patterns: Iterable[str | Pattern] | None, exclude: Iterable[str]) -> tuple[Pattern, ...]:
    """The patterns asked for. Strings name known patterns; Pattern objects are added to them (see `optimize`)."""
    known = {**built_in(), **plugins()}
    if isinstance(patterns, str | Pattern) or isinstance(exclude, str):
        raise TypeError("patterns and exclude take a list of names or Pattern objects, not one")
    given = [p() if isinstance(p, type) and issubclass(p, Pattern) else p for p in patterns or ()]
    for item in given:
        if not isinstance(item, str | Pattern):
            raise TypeError(f"a pattern is a name or a rewriter.Pattern, not {type(item).__name__}")
        if isinstance(item, Pattern):
            _check(item)
    own = {p.name: p for p in given if isinstance(p, Pattern)}
    names = [p for p in given if isinstance(p, str)]
    excluded = list(exclude)
    for name in (*names, *excluded):
        if name not in known and name not in own and not (name in PASSES and name in excluded):
            raise ValueError(f"unknown pattern {name!r}; known are {', '.join(sorted({*known, *own}))}")
    wanted = {n: known[n] for n in names if n in known} if names else known
    applied = {n: p for n, p in {**wanted, **own}.items() if n not in excluded}
    # A composite goes with its parts: not where one of them is excluded, or replaced by a pattern of the user's.
    return tuple(p for n, p in applied.items() if n in own or all(known.get(q) is applied.get(q) for q in p.parts))


def _check(pattern: Pattern) -> None:
    """Refuse a pattern that can't work, before a model is touched."""
    if not isinstance(pattern, Pattern):
        raise TypeError(f"a pattern is a rewriter.Pattern, not {type(pattern).__name__}")
    if not (pattern.name and pattern.references):
        raise ValueError(f"{type(pattern).__name__} needs a name and at least one reference")
    for reference in pattern.references:
        try:
            reference.traced  # noqa: B018  traced once, here rather than inside a training step
        except Exception as error:
            raise ValueError(f"a reference of pattern {pattern.name!r} can't be traced: {error}") from error
