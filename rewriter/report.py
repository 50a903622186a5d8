"""What was done and what was not, and why: plain data, with text, Markdown, JSON and HTML views (render.py)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CheckResult:
    """One verified output or gradient: relative error norms against float64 truth."""

    what: str
    dtype: str
    old_error: float
    new_error: float


@dataclass(frozen=True)
class Measured:
    """What a place takes, as the model has it (old) and rewritten (new), forward and backward: with select="measure".

    ms:      milliseconds of the device; host_ms: of the host until all is issued, 0 on a CPU
    mib:     MiB that wait for backward beside the place's inputs
    against: patterns that old has in it: those of a composite's parts, where that is better than the model's own
    at:      what it was measured on
    stored:  whether an earlier process measured it
    note:    why it was not measured; then there are no figures
    """

    old_ms: float | None = None
    new_ms: float | None = None
    old_host_ms: float | None = None
    new_host_ms: float | None = None
    old_mib: float | None = None
    new_mib: float | None = None
    against: str = ""
    at: str = ""
    stored: bool = False
    note: str = ""


@dataclass(frozen=True)
class Rewrite:
    """One rewrite of one compiled graph, and every module path it serves.

    replacement: name of the op that was put in; details: what kind of match it was
    operators:   how many graph nodes it replaced
    verified:    errors of the proof; empty when verification was off
    lazy:        whether a result that the graph returned is now computed on demand
    parts:       of a composite such as add_rms_norm: the patterns that its places count for as well
    measured:    what it and the original take; None but with select="measure"
    """

    pattern: str
    sites: tuple[str, ...]
    replacement: str
    details: dict[str, Any]
    operators: int
    verified: tuple[CheckResult, ...]
    lazy: bool = False
    parts: tuple[str, ...] = ()
    measured: Measured | None = None


@dataclass(frozen=True)
class Kept:
    """Places where the model itself already calls what would be put in: `call`."""

    pattern: str
    sites: tuple[str, ...]
    call: str


@dataclass(frozen=True)
class OnDemand:
    """Logits that a forward without labels returns and that are computed when somebody looks at them.

    A cross entropy of the caller's own runs fused with the head. classes and width: lengths of a row of the logits and
    of what it is made of.
    """

    sites: tuple[str, ...]
    classes: int
    width: int


@dataclass(frozen=True)
class MadeAgain:
    """Results of a pattern in one compiled graph that are not kept for backward, whose kernels write them again.

    paths: of the regions that ran the graph; results: how many in each
    """

    pattern: str
    paths: tuple[str, ...]
    results: int


@dataclass(frozen=True)
class NearMiss:
    """A place that looked like a pattern and was left alone. node: the graph node the reason speaks of.

    choice:   whether it could have been rewritten and does not pay: `strict` accepts that
    measured: what was measured of it then, with select="measure"
    """

    pattern: str
    sites: tuple[str, ...]
    reason: str
    node: str
    source: str
    choice: bool = False
    measured: Measured | None = None


@dataclass(frozen=True)
class RegionReport:
    """A compiled region: the module paths that ran it, its graphs, and how often they were recompiled."""

    paths: tuple[str, ...]
    kind: str
    graphs: int
    recompiles: int


@dataclass(frozen=True)
class GraphBreak:
    """A place where Dynamo had to leave the graph."""

    reason: str
    count: int


@dataclass(frozen=True)
class Fallback:
    """A region that ran as it was, or a graph that was compiled without rewrites."""

    where: str
    reason: str
    count: int


@dataclass(frozen=True)
class RewriteReport:
    """Everything `rewriter` did to a model so far.

    kept:      places that were recognised and left, because the model itself calls nothing worse there
    notes:     what else it changed about a call, in words
    on_demand: logits that are returned without a loss, and computed when somebody looks at them
    made_again: results that are not kept for backward (with Inductor)
    """

    rewrites: tuple[Rewrite, ...]
    near_misses: tuple[NearMiss, ...]
    regions: tuple[RegionReport, ...]
    graph_breaks: tuple[GraphBreak, ...]
    fallbacks: tuple[Fallback, ...]
    notes: tuple[str, ...]
    environment: dict[str, str]
    kept: tuple[Kept, ...] = ()
    on_demand: tuple[OnDemand, ...] = ()
    made_again: tuple[MadeAgain, ...] = ()

    @property
    def graphs(self) -> int:
        """How many graphs were compiled in all."""
        return sum(r.graphs for r in self.regions)

    @property
    def recompiles(self) -> int:
        """How many of them were further compilations of a region that already had one."""
        return sum(r.recompiles for r in self.regions)

    def sites(self, pattern: str) -> list[str]:
        """The module path of every place in the model that runs as `pattern`: rewritten, or kept as it was so already.

        Composites count for their parts: the places of `add_rms_norm` are among those of `rms_norm`.
        """
        rewritten = [s for r in self.rewrites if pattern in (r.pattern, *r.parts) for s in r.sites]
        kept = [s for k in self.kept if k.pattern == pattern for s in k.sites]
        return list(dict.fromkeys(rewritten + kept))

    def coverage(self) -> dict[str, tuple[int, int]]:
        """pattern -> (places that run as it, places seen: those and the near misses)."""
        result: dict[str, tuple[int, int]] = {}
        named = [name for r in self.rewrites for name in (r.pattern, *r.parts)]
        for name in dict.fromkeys(named + [p.pattern for p in (*self.kept, *self.near_misses)]):
            done = self.sites(name)
            missed = {(s, m.node) for m in self.near_misses if m.pattern == name for s in m.sites if s not in done}
            result[name] = (len(done), len(done) + len(missed))
        return result

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {**dataclasses.asdict(self), "graphs": self.graphs, "recompiles": self.recompiles}

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text; values JSON doesn't know become strings."""
        return json.dumps(self.to_dict(), indent=indent, default=str)

    def save(self, path: str | Path) -> None:
        """Write to `path`; the format follows its ending: .json, .md, .html or .txt. ValueError for another."""
        from rewriter import render

        views = {".json": lambda r: r.to_json(), ".md": render.markdown, ".html": render.html, ".txt": render.text}
        path = Path(path)
        if path.suffix not in views:
            raise ValueError(f"can't save a report as {path.suffix!r}; allowed are {', '.join(views)}")
        path.write_text(views[path.suffix](self) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        from rewriter import render

        return render.text(self)
