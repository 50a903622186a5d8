"""From what `rewrite` did to one graph to the report's entries: module paths, names, sources."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from rewriter.legality import Site
from rewriter.paths import node_path, site_path
from rewriter.report import CheckResult, Kept, NearMiss, OnDemand, Rewrite
from rewriter.rewrite import Applied, Refusal, Result


@dataclass
class GraphRecord:
    """One compiled graph.

    base: the region it was compiled for; paths: every region that ran it since; blocks: inlined blocks it holds.
    made_again: of each pattern, how many results backward makes again.
    """

    base: str
    kind: str
    code: Any
    rewrites: list[Rewrite]
    misses: list[NearMiss]
    kept: list[Kept] = field(default_factory=list)
    on_demand: list[OnDemand] = field(default_factory=list)
    made_again: Counter[str] = field(default_factory=Counter)
    paths: dict[str, None] = field(default_factory=dict)
    blocks: set[str] = field(default_factory=set)


class ModulePaths:
    """id of a module -> its path in the model, as it is at the last `refresh`."""

    def __init__(self, model: nn.Module | None):
        self._model = weakref.ref(model) if model is not None else lambda: None
        self._known: dict[int, str] = {}

    def refresh(self) -> None:
        model = self._model()
        self._known = {}
        if model is not None:
            self._walk(model, "")

    def _walk(self, module: nn.Module, path: str) -> None:
        """As `named_modules`, but not by it: a module that swaps weights in its forward may put them back there."""
        if id(module) in self._known:
            return
        self._known[id(module)] = path
        for name, child in module._modules.items():
            if child is not None:
                self._walk(child, f"{path}.{name}" if path else name)

    def of(self, module_id: int) -> str | None:
        return self._known.get(module_id)


class _Ordinals:
    """A second site at the same module path gets `#2`, and so on."""

    def __init__(self) -> None:
        self._count: Counter[tuple[str, str]] = Counter()

    def name(self, pattern: str, path: str) -> str:
        self._count[pattern, path] += 1
        n = self._count[pattern, path]
        return path if n == 1 else f"{path}#{n}"


def rewrites_of(result: Result, base: str, whole: bool, modules: ModulePaths) -> list[Rewrite]:
    """The report's entries for the sites of one graph, with paths in the region `base`, maybe the `whole` model."""
    names = _Ordinals()
    return [_rewrite(applied, names, base, whole, modules) for applied in result.applied]


def kept_of(result: Result, base: str, whole: bool, modules: ModulePaths) -> list[Kept]:
    """The report's entries for what was recognised in one graph and left, since nothing better is known."""
    names, kept = _Ordinals(), []
    for entry in result.kept:
        path = site_path(entry.outputs, entry.nodes, base, whole, modules.of)
        kept.append(Kept(entry.pattern, (names.name(entry.pattern, path),), entry.call))
    return kept


def on_demand_of(result: Result, base: str, modules: ModulePaths) -> list[OnDemand]:
    """The report's entries for logits that one graph returns without a loss."""
    names, found = _Ordinals(), []
    for logits in result.logits:
        path = site_path(logits.nodes[-1:], logits.nodes, base, True, modules.of)
        found.append(OnDemand((names.name("", path),), logits.classes, logits.width))
    return found


def misses_of(result: Result, base: str, modules: ModulePaths) -> list[NearMiss]:
    """The report's entries for what was left alone in one graph."""
    return [_miss(refusal, base, modules) for refusal in result.refused]


def _rewrite(applied: Applied, names: _Ordinals, base: str, whole: bool, modules: ModulePaths) -> Rewrite:
    site, proof = applied.site, applied.proof
    places = dict.fromkeys(site_path(outputs, nodes, base, whole, modules.of) for outputs, nodes in _places(site))
    checks = tuple(CheckResult(c.what, c.dtype, c.old_error, c.new_error) for c in proof.checks) if proof else ()
    return Rewrite(
        site.pattern,
        tuple(names.name((*site.matches[0].pattern.parts, site.pattern)[0], path) for path in places),
        getattr(site.call.fn, "__name__", repr(site.call.fn)),
        dict(site.call.note),
        len(site.covered),
        checks,
        bool(site.lazy),
        site.matches[0].pattern.parts,
        applied.measured,
    )


def _places(site: Site) -> Iterator[tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]]:
    """Results and operators of each match that one call serves: in one module they are one place, else several."""
    if len(site.matches) == 1:
        yield site.outputs, site.covered
        return
    for match in site.matches:
        own = {value.node for value in match.bound.values()}
        yield match.outputs, tuple(node for node in site.covered if node in own)


def _miss(refusal: Refusal, base: str, modules: ModulePaths) -> NearMiss:
    node = refusal.node
    path = node_path(node, base, modules.of) if node is not None else base
    source = _source_line(node.meta.get("stack_trace") or "") if node is not None else ""
    name = node.name if node is not None else ""
    return NearMiss(refusal.pattern, (path,), refusal.reason, name, source, refusal.choice, refusal.measured)


def _source_line(stack_trace: str) -> str:
    """`file:line: code` of the innermost frame of a stack trace."""
    lines = [line.strip() for line in stack_trace.splitlines()]
    for i in reversed(range(len(lines))):
        if (found := re.match(r'File "(.*)", line (\d+)', lines[i])) is not None:
            code = lines[i + 1] if i + 1 < len(lines) else ""
            return f"{found[1]}:{found[2]}: {code}"
    return ""
