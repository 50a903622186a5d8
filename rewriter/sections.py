"""What every view of a report says, as tables of plain text. How it looks is decided in render.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rewriter.report import CheckResult, Measured, Rewrite, RewriteReport
from rewriter.sites import compressed

NOTHING = "nothing has been compiled yet: run a training step"
Cell = tuple[str, ...]  # its lines


@dataclass(frozen=True)
class Section:
    """One table. code: the columns that hold paths and identifiers; full_only: left out of the short (text) view."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    code: frozenset[str] = frozenset()
    full_only: bool = False


def header(report: RewriteReport) -> str:
    """The environment in one line."""
    return ", ".join(f"{name} {value}" for name, value in report.environment.items())


def summary(report: RewriteReport) -> str:
    """The report in one line."""
    if not _contents(report):
        return NOTHING
    rewritten = sum(len({s for r in report.rewrites if r.pattern == name for s in r.sites}) for name in _names(report))
    kept = sum(len(k.sites) for k in report.kept)
    demanded = len({site for d in report.on_demand for site in d.sites})
    missed, left = (
        len({(m.pattern, s, m.node, m.reason) for m in report.near_misses if m.choice is choice for s in m.sites})
        for choice in (False, True)
    )
    counts = (
        (rewritten, "place rewritten", "places rewritten"),
        *([(demanded, "result on demand", "results on demand")] if demanded else []),
        *([(kept, "place already so", "places already so")] if kept else []),
        *([(left, "place left, as it does not pay", "places left, as they do not pay")] if left else []),
        (missed, "near miss", "near misses"),
        (report.graphs, "graph compiled", "graphs compiled"),
        (report.recompiles, "recompile", "recompiles"),
        (sum(b.count for b in report.graph_breaks), "graph break", "graph breaks"),
        (sum(f.count for f in report.fallbacks), "fallback", "fallbacks"),
    )
    return ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in counts)


def sections(report: RewriteReport) -> list[Section]:
    """The tables that have anything to say."""
    tables = [_coverage(report), _rewrites(report), _on_demand(report), _kept(report), _verification(report)]
    tables += [
        _made_again(report),
        _left(report),
        _near_misses(report),
        _regions(report),
        _graph_breaks(report),
        _fallbacks(report),
        _notes(report),
    ]
    return [table for table in tables if table.rows]


def _contents(report: RewriteReport) -> tuple:
    return (
        report.rewrites
        + report.on_demand
        + report.kept
        + report.near_misses
        + report.regions
        + report.graph_breaks
        + report.fallbacks
    )


def _names(report: RewriteReport) -> list[str]:
    return list(dict.fromkeys(r.pattern for r in report.rewrites))


def _coverage(report: RewriteReport) -> Section:
    rows = [(_line(p), _line(done), _line(seen)) for p, (done, seen) in report.coverage().items()]
    return Section("Patterns", ("pattern", "done", "seen"), tuple(rows), frozenset({"pattern"}))


def _rewrites(report: RewriteReport) -> Section:
    rows = []
    timed = any(r.measured for r in report.rewrites)
    for group in _grouped(report.rewrites, _kind):
        first = group[0]
        sites = [s for r in group for s in r.sites]
        worst = _worst([c for r in group for c in r.verified])
        operators = sorted({r.operators for r in group})
        measured = tuple(line for m in dict.fromkeys(r.measured for r in group) for line in _times(m))
        rows.append(
            (
                (first.pattern, f"by {first.replacement}", *_details(first)),
                _where(sites),
                _line(operators[0] if len(operators) == 1 else f"{operators[0]}-{operators[-1]}"),
                (_error(worst), f"{worst.what}, {worst.dtype}") if worst else _line("not verified"),
                *([measured] if timed else []),
            )
        )
    columns = ("pattern", "where", "nodes", "worst error (original's)", *(["measured (original)"] if timed else []))
    return Section("Rewrites", columns, tuple(rows), frozenset({"where"}))


def _kept(report: RewriteReport) -> Section:
    rows = []
    for group in _grouped(report.kept, lambda k: (k.pattern, k.call)):
        rows.append((_line(group[0].pattern), _where([s for k in group for s in k.sites]), _line(group[0].call)))
    return Section("Already so", ("pattern", "where", "the model's own call"), tuple(rows), frozenset({"where"}))


def _on_demand(report: RewriteReport) -> Section:
    rows = []
    for group in _grouped(report.on_demand, lambda d: (d.classes, d.width)):
        sizes = f"{group[0].classes} of {group[0].width}"
        why = ("computed when looked at: a cross entropy", "of your own runs fused with the head")
        rows.append((_where([s for d in group for s in d.sites]), _line(sizes), why))
    columns = ("where", "classes", "what is done")
    return Section("Logits without a loss", columns, tuple(rows), frozenset({"where"}))


def _made_again(report: RewriteReport) -> Section:
    rows = []
    for group in _grouped(report.made_again, lambda m: (m.pattern, m.results)):
        where = _where(dict.fromkeys(path for m in group for path in m.paths))
        rows.append((_line(group[0].pattern), where, _line(group[0].results)))
    columns = ("pattern", "where", "results of each")
    return Section("Not kept, as backward makes it again", columns, tuple(rows), frozenset({"where"}))


def _verification(report: RewriteReport) -> Section:
    rows = []
    for group in _grouped(report.rewrites, _kind):
        for checks in _grouped([c for r in group for c in r.verified], lambda c: (c.what, c.dtype)):
            worst = _worst(checks) or checks[0]
            name = (group[0].pattern, *_details(group[0]))
            rows.append((name, _line(worst.what), _line(worst.dtype), _line(_error(worst))))
    columns = ("pattern", "compared", "dtype", "error against float64 (original's)")
    return Section("Verification", columns, tuple(rows), full_only=True)


def _left(report: RewriteReport) -> Section:
    rows = []
    left = [m for m in report.near_misses if m.choice]
    for group in _grouped(left, lambda m: (m.pattern, m.reason, m.measured, m.source)):
        first = group[0]
        why = (*first.reason.splitlines(), *_times(first.measured)[1:], *first.source.splitlines())
        rows.append((_line(first.pattern), _where([s for m in group for s in m.sites]), why))
    return Section("Left, as it does not pay", ("pattern", "where", "why"), tuple(rows), frozenset({"where"}))


def _near_misses(report: RewriteReport) -> Section:
    rows = []
    missed = [m for m in report.near_misses if not m.choice]
    for group in _grouped(missed, lambda m: (m.pattern, m.reason, m.node, m.source)):
        first = group[0]
        node = (f"node {first.node}",) if first.node else ()
        why = (*first.reason.splitlines(), *node, *first.source.splitlines())
        rows.append((_line(first.pattern), _where([s for m in group for s in m.sites]), why))
    return Section("Near misses", ("pattern", "where", "why not"), tuple(rows), frozenset({"where"}))


def _regions(report: RewriteReport) -> Section:
    rows = [(_line(r.kind), _where(r.paths), _line(r.graphs), _line(r.recompiles)) for r in report.regions]
    return Section("Regions", ("region", "modules", "graphs", "recompiles"), tuple(rows), frozenset({"modules"}))


def _graph_breaks(report: RewriteReport) -> Section:
    rows = [(_line(b.count), tuple(b.reason.splitlines())) for b in report.graph_breaks]
    return Section("Graph breaks", ("times", "reason"), tuple(rows))


def _fallbacks(report: RewriteReport) -> Section:
    rows = []
    for group in _grouped(report.fallbacks, lambda f: (f.reason, f.count)):
        first = group[0]
        rows.append((_where([f.where for f in group]), _line(first.count), tuple(first.reason.splitlines())))
    return Section("Fallbacks", ("where", "times each", "reason"), tuple(rows), frozenset({"where"}))


def _notes(report: RewriteReport) -> Section:
    return Section("Notes", ("what else changed",), tuple((tuple(note.splitlines()),) for note in report.notes))


def _grouped(items: Iterable[Any], key: Callable) -> list[list[Any]]:
    """Items of equal key together, in order of first appearance."""
    items = list(items)
    order = {k: i for i, k in reversed(list(enumerate(map(key, items))))}
    return [list(group) for _, group in groupby(sorted(items, key=lambda i: order[key(i)]), key)]


def _kind(rewrite: Rewrite) -> tuple:
    return rewrite.pattern, repr(rewrite.details), rewrite.replacement, rewrite.lazy


def _details(rewrite: Rewrite) -> Cell:
    lazy = ("result on demand",) if rewrite.lazy else ()
    return (*(f"{name}={value}" for name, value in rewrite.details.items()), *lazy)


def _where(sites: Iterable[str]) -> Cell:
    """Compressed paths, each with the number of places that it stands for."""
    named = [(path or "<model>", count) for path, count in compressed(sites)]
    return tuple(path if count == 1 else f"{path}  x{count}" for path, count in named)


def _worst(checks: Iterable[CheckResult]) -> CheckResult | None:
    """The check with the largest error; those without a dtype compared nothing (no gradient, before and after)."""
    return max((c for c in checks if c.dtype), key=lambda c: c.new_error, default=None)


def _error(check: CheckResult) -> str:
    return f"{check.new_error:.1e} ({check.old_error:.1e})" if check.dtype else "no gradient in either"


def _times(measured: Measured | None) -> Cell:
    """The figures of a measurement; the original's, or what took its place in the comparison, in brackets."""
    if measured is None:
        return ()
    if measured.new_ms is None:
        return _line(measured.note)
    lines = [
        f"{measured.new_ms:.3g} ms ({measured.old_ms:.3g})",
        f"{measured.new_mib:.3g} MiB kept ({measured.old_mib:.3g})",
    ]
    if measured.new_host_ms:
        lines.append(f"host {measured.new_host_ms:.3g} ms ({measured.old_host_ms:.3g})")
    if measured.against:
        lines.append(f"original with {measured.against}")
    return (*lines, f"on {measured.at}", *(["measured before"] if measured.stored else []))


def _line(value: Any) -> Cell:
    return (str(value),)
