"""One optimised model: its options, and the record of everything compiled for it. The report is made from here."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.utils import counters

from rewriter import context
from rewriter.attach import REASON
from rewriter.environment import environment
from rewriter.log import log
from rewriter.paths import node_path, outer_frame_is
from rewriter.pattern import Pattern
from rewriter.record import GraphRecord, ModulePaths, kept_of, misses_of, on_demand_of, rewrites_of
from rewriter.report import (
    Fallback,
    GraphBreak,
    Kept,
    MadeAgain,
    NearMiss,
    OnDemand,
    RegionReport,
    Rewrite,
    RewriteReport,
)
from rewriter.rewrite import Fuel, Proofs, Result
from rewriter.select import MEMORY_RATE, Selection


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
    select: str = "shipped"
    memory_rate: float = MEMORY_RATE
    make_again: bool = True


class Session:
    """Shared by all regions of a model, and by copies of the model."""

    def __init__(self, model: nn.Module | None, options: Options):
        self.options = options
        self.proofs = Proofs(options.verify != "off")
        self.selection = Selection(options.select, options.executor, options.memory_rate)
        self.fuel = Fuel()
        self.graphs: list[GraphRecord] = []
        self.order: dict[str, int] = {}
        self.kinds: dict[str, str] = {}
        self._modules = ModulePaths(model)
        self._fallbacks: Counter[tuple[str, str]] = Counter()
        self._given_up: set[str] = set()
        self._notes: dict[str, None] = {}
        self._breaks = _breaks()
        self.inlined: tuple[str, ...] = ()
        self.outermost: list[CodeType] = []  # of the outermost forward, and of what wraps it
        self.when_in_pieces: Callable[[], None] | None = None
        self._in_pieces = False
        self._training_calls: set[frozenset[str]] = set()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Session:
        return self

    def __reduce__(self) -> Any:
        return (_nothing, ())  # an unpickled model is a plain one; `optimize` it again

    # ---- while the model runs

    def wants(self, kind: str, path: str, args: tuple, kwargs: dict) -> bool:
        """Whether this call should run compiled. Inference runs the model's own code: caches would recompile it."""
        if path in self._given_up or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if kind != "model":
            return torch.is_grad_enabled()
        given = frozenset(k for k, v in kwargs.items() if v is not None) | {f"#{len(args)}"}
        if torch.is_grad_enabled():
            self._training_calls.add(given)
            return True
        return given in self._training_calls  # evaluation with labels: the same fused tail

    def about_to_run(self, kind: str) -> None:
        """Called before a region runs compiled. Blocks become regions here, not when the last forward has shown that
        they should: its backward may run them again (checkpointing), and must find them as they were."""
        if kind == "model" and self._in_pieces and torch._C._current_graph_task_id() == -1:  # in no backward
            self._in_pieces = False
            self.when_in_pieces()
            self.when_in_pieces = None

    def ran(self, frame: context.Frame, kind: str) -> None:
        """Called after a region ran; one that ran no graph of ours fell back to its own code."""
        if frame.graphs == 0 and kind != "model":
            self.fallback(frame.path, "ran without a compiled graph: Dynamo skipped it or hit its recompile limit")
        if kind == "model" and self.when_in_pieces is not None:
            # Where Dynamo gave up on the outermost forward, no graph holds two blocks. Then they become regions of
            # their own, which share their graphs whatever happens around them.
            self._in_pieces = not any(len(record.blocks) > 1 for record in self.graphs)
            if not self._in_pieces:
                self.when_in_pieces = None

    def note_run(self, record: GraphRecord) -> None:
        frame = context.current()
        if frame is None:
            record.paths.setdefault(record.base)
            return
        frame.graphs += 1
        if frame.path not in record.paths:
            record.paths[frame.path] = None

    def note(self, text: str) -> None:
        self._notes[text] = None

    def fallback(self, where: str, reason: str) -> None:
        with self._lock:
            self._fallbacks[where, reason] += 1

    def give_up(self, path: str, error: Exception) -> None:
        """Run a region as it is from now on; with `strict`, raise what the backend raised."""
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, RewriteError):
            raise inner
        self._given_up.add(path)
        text = str(error).strip()
        log.warning("%s runs its own code: %s: %s", path or "the model", type(error).__name__, text)
        self.fallback(path, f"runs its own code: {type(error).__name__}: {_headline(text)}")

    # ---- while a graph is compiled

    def running(self) -> str:
        """Path of the region that is running in this thread."""
        frame = context.current()
        return frame.path if frame else ""

    def is_outermost(self, node: fx.Node) -> bool:
        """Whether a node was captured from the code of the outermost forward itself, as the frame that Dynamo ran."""
        if context.current() is None or self.kinds.get(self.running()) != "model":
            return False
        return any(outer_frame_is(code, node.meta.get("stack_trace") or "") for code in self.outermost)

    def record(self, result: Result, graph: fx.Graph, code: Any) -> GraphRecord:
        """Keep what `rewrite` did to a graph; called before the graph first runs."""
        base = self.running()
        self._modules.refresh()
        kind = self.kinds.get(base, "model")
        rewrites = rewrites_of(result, base, kind == "model", self._modules)
        misses, kept = misses_of(result, base, self._modules), kept_of(result, base, kind == "model", self._modules)
        record = GraphRecord(base, kind, code, rewrites, misses, kept, on_demand_of(result, base, self._modules))
        for node in graph.nodes:
            path = node_path(node, base, self._modules.of)
            record.blocks.update(block for block in self.inlined if path == block or path.startswith(block + "."))
        with self._lock:
            self.graphs.append(record)
        return record

    # ---- afterwards

    def report(self) -> RewriteReport:
        rewrites: dict[Any, Rewrite] = {}
        misses: dict[Any, NearMiss] = {}
        kept: dict[Any, Kept] = {}
        on_demand: dict[OnDemand, None] = {}
        for record in self.graphs:
            for rewrite in record.rewrites:
                sites = self._everywhere(rewrite.sites, record)
                key = (rewrite.pattern, sites, repr(rewrite.details), record.kind)
                rewrites.setdefault(key, dataclasses.replace(rewrite, sites=sites))
            for miss in record.misses:
                sites = self._everywhere(miss.sites, record)
                misses.setdefault((miss.pattern, sites, miss.reason, miss.node), dataclasses.replace(miss, sites=sites))
            for entry in record.kept:
                sites = self._everywhere(entry.sites, record)
                kept.setdefault((entry.pattern, sites, entry.call), dataclasses.replace(entry, sites=sites))
            for logits in record.on_demand:
                sites = self._everywhere(logits.sites, record)
                on_demand.setdefault(dataclasses.replace(logits, sites=sites))
        return RewriteReport(
            rewrites=tuple(rewrites.values()),
            near_misses=tuple(misses.values()),
            regions=self._regions(),
            graph_breaks=self._graph_breaks(),
            fallbacks=tuple(Fallback(w, r, n) for (w, r), n in self._fallbacks.items()),
            notes=tuple(self._notes),
            environment=environment(self.options.executor),
            kept=tuple(kept.values()),
            on_demand=tuple(on_demand),
            made_again=self._made_again(),
        )

    def _everywhere(self, sites: tuple[str, ...], record: GraphRecord) -> tuple[str, ...]:
        """Sites of the region a graph was compiled for, in every region that ran it, in module order."""
        paths = sorted(record.paths or {record.base: None}, key=lambda p: self.order.get(p, -1))
        result = []
        for path in paths:
            for site in sites:
                inside = record.base and re.match(re.escape(record.base) + r"(?:[.#]|$)", site)
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

    def _made_again(self) -> tuple[MadeAgain, ...]:
        found: dict[MadeAgain, None] = {}
        for record in self.graphs:
            paths = tuple(sorted(record.paths, key=lambda p: self.order.get(p, -1)))
            found.update((MadeAgain(pattern, paths, n), None) for pattern, n in record.made_again.items())
        return tuple(found)

    def _graph_breaks(self) -> tuple[GraphBreak, ...]:
        news = _breaks() - self._breaks
        return tuple(GraphBreak(_headline(why), n) for why, n in news.items() if REASON not in why)


def _nothing() -> None:
    return None


def _breaks() -> Counter[str]:
    """Why Dynamo broke graphs in this process; a frame it gave up altogether counts under another name."""
    return Counter(counters["graph_break"]) | Counter(counters["unimplemented"])


def _headline(reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]
