"""One optimised model: its options, and the record of everything compiled for it. The report is made from here."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.utils import counters

from rewriter import context
from rewriter.attach import REASON
from rewriter.environment import environment
from rewriter.paths import site_path
from rewriter.pattern import Pattern
from rewriter.report import CheckResult, Fallback, GraphBreak, NearMiss, RegionReport, Rewrite, RewriteReport
from rewriter.rewrite import Fuel, Proofs, Result


class RewriteError(RuntimeError):
    """Raised with `strict=True` where something was not rewritten."""


@dataclass(frozen=True)
class Options:
    """The arguments of `optimize`, checked."""

    patterns: tuple[Pattern, ...]
    executor: str
    dynamic: bool | None
    verify: str
    strict: bool
    dry: bool = False


@dataclass
class GraphRecord:
    """One compiled graph. base: the region it was compiled for; paths: every region that ran it since."""

    base: str
    kind: str
    code: Any
    rewrites: list[Rewrite]
    misses: list[NearMiss]
    paths: dict[str, None] = field(default_factory=dict)


class Session:
    """Shared by all regions of a model, and by copies of the model."""

    def __init__(self, model: nn.Module | None, options: Options):
        self.options = options
        self.proofs = Proofs(options.verify != "off")
        self.fuel = Fuel()
        self.graphs: list[GraphRecord] = []
        self.order: dict[str, int] = {}
        self.kinds: dict[str, str] = {}
        self._modules = _Paths(model)
        self._fallbacks: Counter[tuple[str, str]] = Counter()
        self._breaks = Counter(counters["graph_break"])
        self._seen: set[tuple[str, int]] = set()
        self._training_calls: set[frozenset[str]] = set()
        self._lock = threading.Lock()
        self.closed = False

    def __deepcopy__(self, memo: dict) -> Session:
        return self

    def __reduce__(self) -> Any:
        return (_nothing, ())  # an unpickled model is a plain one; `optimize` it again

    # ---- while the model runs

    def wants(self, kind: str, module: nn.Module, args: tuple, kwargs: dict) -> bool:
        """Whether this call should run compiled. Inference runs the model's own code: caches would recompile it."""
        if self.closed or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if kind != "model":
            return torch.is_grad_enabled()
        given = frozenset(k for k, v in kwargs.items() if v is not None) | {f"#{len(args)}"}
        if torch.is_grad_enabled():
            self._training_calls.add(given)
            return True
        return given in self._training_calls  # evaluation with labels: the same fused tail

    def ran(self, frame: context.Frame, kind: str) -> None:
        """Called after a region ran; one that ran no graph of ours fell back to its own code."""
        if frame.graphs == 0 and kind != "model":
            self.fallback(frame.path, "ran without a compiled graph: Dynamo skipped it or hit its recompile limit")

    def note_run(self, record: GraphRecord) -> None:
        frame = context.current()
        if frame is None:
            record.paths.setdefault(record.base)
            return
        frame.graphs += 1
        if frame.path not in record.paths:
            record.paths[frame.path] = None

    def fallback(self, where: str, reason: str) -> None:
        with self._lock:
            self._fallbacks[where, reason] += 1

    def user_error(self, error: Exception) -> Exception:
        inner = getattr(error, "inner_exception", None)
        return inner if isinstance(inner, RewriteError) else error

    # ---- while a graph is compiled

    def record(self, result: Result, gm: fx.GraphModule, code: Any) -> GraphRecord:
        """Keep what `rewrite` did to a graph; called before the graph first runs."""
        frame = context.current()
        base = frame.path if frame else ""
        kind = self.kinds.get(base, "model")
        names = _Ordinals()
        rewrites = [_rewrite(site, proof, names, base, self._modules) for site, proof in result.applied]
        misses = [_miss(r, base, self._modules) for r in result.refused]
        record = GraphRecord(base, kind, code, rewrites, misses)
        with self._lock:
            self.graphs.append(record)
        return record

    # ---- afterwards

    def report(self) -> RewriteReport:
        rewrites: dict[Any, Rewrite] = {}
        misses: dict[Any, NearMiss] = {}
        for record in self.graphs:
            for rewrite in record.rewrites:
                sites = self._everywhere(rewrite.sites, record)
                key = (rewrite.pattern, sites, repr(rewrite.details), record.kind)
                rewrites.setdefault(key, _with(rewrite, sites))
            for miss in record.misses:
                sites = self._everywhere(miss.sites, record)
                misses.setdefault((miss.pattern, sites, miss.reason, miss.node), _with(miss, sites))
        return RewriteReport(
            rewrites=tuple(rewrites.values()),
            near_misses=tuple(misses.values()),
            regions=self._regions(),
            graph_breaks=self._graph_breaks(),
            fallbacks=tuple(Fallback(w, r, n) for (w, r), n in self._fallbacks.items()),
            environment=environment(self.options.executor),
        )

    def _everywhere(self, sites: tuple[str, ...], record: GraphRecord) -> tuple[str, ...]:
        """Sites of the region a graph was compiled for, in every region that ran it, in module order."""
        paths = sorted(record.paths or {record.base: None}, key=lambda p: self.order.get(p, -1))
        result = []
        for path in paths:
            for site in sites:
                inside = record.base and (site == record.base or site.startswith((record.base + ".", record.base + "#")))
                result.append(path + site[len(record.base) :] if inside else site)
        return tuple(dict.fromkeys(result))

    def _regions(self) -> tuple[RegionReport, ...]:
        groups: dict[Any, list[GraphRecord]] = {}
        for record in self.graphs:
            groups.setdefault((record.kind, record.code), []).append(record)
        regions = []
        for (kind, _), records in groups.items():
            paths = tuple(sorted({p for r in records for p in r.paths}, key=lambda p: self.order.get(p, -1)))
            regions.append(RegionReport(paths, kind, len(records), len(records) - 1))
        return tuple(regions)

    def _graph_breaks(self) -> tuple[GraphBreak, ...]:
        news = Counter(counters["graph_break"])
        news.subtract(self._breaks)
        return tuple(GraphBreak(_headline(why), n) for why, n in news.items() if n > 0 and REASON not in why)


def _nothing() -> None:
    return None


def _with(item: Any, sites: tuple[str, ...]) -> Any:
    import dataclasses

    return dataclasses.replace(item, sites=sites)


def _headline(reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


class _Paths:
    """id of a module -> its path in the model; refreshed when a module appears that it doesn't know."""

    def __init__(self, model: nn.Module | None):
        import weakref

        self._model = weakref.ref(model) if model is not None else lambda: None
        self._known: dict[int, str] = {}

    def of(self, module_id: int) -> str | None:
        if module_id not in self._known:
            model = self._model()
            if model is not None:
                self._known = {id(m): name for name, m in model.named_modules()}
        return self._known.get(module_id)


class _Ordinals:
    """A second site at the same module path gets `#2`, and so on."""

    def __init__(self) -> None:
        self._count: Counter[tuple[str, str]] = Counter()

    def name(self, pattern: str, path: str) -> str:
        self._count[pattern, path] += 1
        n = self._count[pattern, path]
        return path if n == 1 else f"{path}#{n}"


def _rewrite(site: Any, proof: Any, names: _Ordinals, base: str, modules: _Paths) -> Rewrite:
    path = site_path(site.outputs, site.covered, base, modules.of)
    checks = tuple(CheckResult(c.what, c.dtype, c.old_error, c.new_error) for c in proof.checks) if proof else ()
    return Rewrite(
        site.pattern,
        (names.name(site.pattern, path),),
        getattr(site.call.fn, "__name__", repr(site.call.fn)),
        dict(site.call.note),
        len(site.covered),
        checks,
        bool(site.lazy),
    )


def _miss(refusal: Any, base: str, modules: _Paths) -> NearMiss:
    node = refusal.node
    path = site_path((node,), (node,), base, modules.of) if node is not None else base
    source = ""
    if node is not None and node.meta.get("stack_trace"):
        lines = [line.strip() for line in node.meta["stack_trace"].strip().splitlines()]
        source = " ".join(lines[-2:]) if len(lines) >= 2 else lines[-1]
    return NearMiss(refusal.pattern, (path,), refusal.reason, node.name if node is not None else "", source)
