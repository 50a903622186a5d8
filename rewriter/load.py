"""Read a saved report back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rewriter.report import (
    CheckResult,
    Fallback,
    GraphBreak,
    Kept,
    Measured,
    NearMiss,
    OnDemand,
    RegionReport,
    Rewrite,
    RewriteReport,
)

# What a field that an older report lacks, or that has a default, is taken to be.
_DEFAULTS: dict[str, Any] = {"lazy": False, "parts": (), "notes": (), "kept": (), "on_demand": (), "choice": False,
                             "measured": None}  # fmt: skip
# Fields that hold other records.
_RECORDS: dict[str, type] = {
    "rewrites": Rewrite,
    "kept": Kept,
    "near_misses": NearMiss,
    "on_demand": OnDemand,
    "regions": RegionReport,
    "graph_breaks": GraphBreak,
    "fallbacks": Fallback,
    "verified": CheckResult,
}


def load_report(path: str | Path) -> RewriteReport:
    """The report that was written with `report.save("x.json")`.

    Values of `details` that JSON has no word for come back as strings. Raises OSError for a file that can't be read and
    ValueError for one that holds no report.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise ValueError(f"{path} is no report: {error}") from error
    try:
        return report_from_dict(data)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no report: {error.args[0]}") from error


def report_from_dict(data: Mapping[str, Any]) -> RewriteReport:
    """The inverse of `report.to_dict()`. Reports of other versions stay readable: unknown fields are ignored."""
    return _record(RewriteReport, data)


def _record(kind: type, data: Any) -> Any:
    if not isinstance(data, Mapping):
        raise TypeError(f"{kind.__name__} is an object, not {type(data).__name__}")
    given = {**_DEFAULTS, **data}
    names = [f.name for f in fields(kind)]
    missing = [name for name in names if name not in given]
    if missing:
        raise KeyError(f"{kind.__name__} has no {missing[0]}")
    return kind(**{name: _value(name, given[name]) for name in names})


def _value(name: str, given: Any) -> Any:
    if name == "measured":
        return None if given is None else _record(Measured, given)
    if name in _RECORDS:
        return tuple(_record(_RECORDS[name], item) for item in given)
    return tuple(given) if isinstance(given, list) else given
