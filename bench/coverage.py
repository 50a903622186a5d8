"""The site census of every causal language model that transformers knows: places that ran, and places that were found.

    python bench/coverage.py                                 # all of them, tiny, on two CPU cores
    python bench/coverage.py --types llama,gpt2 --misses     # some, with every place that was missed

What ran is counted without our matcher (tests/zoo/census.py) in a forward of the untouched model; what was found is
read from the report after a training step. bench/README.md says how to read the table.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import warnings
from collections import Counter, defaultdict
from multiprocessing import get_context
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "tests"))  # the zoo is the tests'

SHAPE = (2, 12)


def look(model_type: str) -> dict:
    """One type: rows of the census, near misses, fallbacks and graph breaks; or the error."""
    import torch
    from zoo.census import census, compare
    from zoo.models import batch, build

    import rewriter

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch._dynamo.reset()
    try:
        model = build(model_type)
        inputs = batch(model, SHAPE)
        ran = census(copy.deepcopy(model), inputs)
        outputs = rewriter.optimize(model)(**inputs)
        outputs.loss.backward()
        report = rewriter.report(model)
    except Exception as error:  # one that fails is a row of the table, not the end of it
        return {"type": model_type, "error": f"{type(error).__name__}: {error}"[:500]}
    return {
        "type": model_type,
        "error": "",
        "rows": [vars(row) for row in compare(ran, report)],
        "near_misses": [(m.pattern, m.reason, len(m.sites), m.source) for m in report.near_misses],
        "fallbacks": [(f.where, f.reason, f.count) for f in report.fallbacks],
        "graph_breaks": [(b.reason, b.count) for b in report.graph_breaks],
        "graphs": report.graphs,
    }


def summary(results: list[dict]) -> dict:
    """kind -> [places found, places that ran, types where it ran, types where every place was found]."""
    found, ran = Counter(), Counter()
    types, whole = defaultdict(set), defaultdict(set)
    for result in results:
        short = set()
        for row in result.get("rows", ()):
            if not row["ran"]:
                continue
            kind = row["pattern"]
            ran[kind] += row["ran"]
            found[kind] += min(row["found"], row["ran"])
            types[kind].add(result["type"])
            if row["found"] < row["ran"]:
                short.add(kind)
        for kind in types:
            if result["type"] in types[kind] and kind not in short:
                whole[kind].add(result["type"])
    return {kind: [found[kind], ran[kind], len(types[kind]), len(whole[kind])] for kind in sorted(ran)}


def misses(results: list[dict]) -> list[dict]:
    """Every path where fewer places were found than ran, with what the report says of it."""
    return [{"type": r["type"], **row} for r in results for row in r.get("rows", ()) if row["found"] < row["ran"]]


def ranked(results: list[dict]) -> list[tuple[str, str, int, int]]:
    """(pattern, reason of near misses, places, types), the most frequent first: the next pattern to write."""
    places, types = Counter(), defaultdict(set)
    for result in results:
        for pattern, reason, count, _ in result.get("near_misses", ()):
            places[pattern, reason] += count
            types[pattern, reason].add(result["type"])
    return [(*key, n, len(types[key])) for key, n in sorted(places.items(), key=lambda i: (-len(types[i[0]]), -i[1]))]


def table(results: list[dict], every_miss: bool = False) -> str:
    lines = [f"{'kind':12} {'found':>6} {'ran':>6} {'share':>7} {'types':>6} {'whole':>6}"]
    for kind, (found, ran, types, whole) in summary(results).items():
        lines.append(f"{kind:12} {found:6} {ran:6} {100 * found / ran:6.1f}% {types:6} {whole:6}")
    failed = [r for r in results if r["error"]]
    lines += [f"failed: {r['type']}: {r['error']}" for r in failed]
    shown = misses(results) if every_miss else []
    lines += ["", "missed"] if shown else []
    lines += [
        f"{m['type']:24} {m['pattern']:10} {m['path']}: {m['found']}/{m['ran']} {'; '.join(m['reasons'])}"
        for m in shown
    ]
    lines += ["", "near misses (types, places)"]
    lines += [
        f"{t:4} {n:5}  {pattern}: {reason}" for pattern, reason, n, t in ranked(results)[: 200 if every_miss else 20]
    ]
    return "\n".join(lines)


def run(types: list[str], workers: int) -> list[dict]:
    """Each worker process takes a few types, as Dynamo's caches grow."""
    results = []
    with get_context("spawn").Pool(workers, maxtasksperchild=25) as pool:
        for result in pool.imap_unordered(look, types):
            results.append(result)
            print(f"{len(results)}/{len(types)} {result['type']} {result['error']}", file=sys.stderr, flush=True)
    return sorted(results, key=lambda r: r["type"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", help="comma-separated; default: all that can be built")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--misses", action="store_true", help="print every place that was missed")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/coverage-<date>.json for all types")
    args = parser.parse_args()

    from zoo.models import TYPES

    from rewriter.environment import environment

    types = args.types.split(",") if args.types else TYPES
    if unknown := set(types) - set(TYPES):
        parser.error(f"unknown type {sorted(unknown)[0]!r}")
    results = run(types, args.workers)
    print(table(results, args.misses))
    out = args.out or (None if args.types else FOLDER / "results" / f"coverage-{datetime.date.today()}.json")
    if out:
        content = {
            "benchmark": "coverage",
            "environment": environment("eager"),
            "columns": ["found", "ran", "types", "types with every place"],
            "summary": summary(results),
            "misses": misses(results),
            "near_misses": ranked(results),
            "types": {r["type"]: {k: r[k] for k in r if k not in ("type", "rows", "near_misses")} for r in results},
        }
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(out)
    return int(any(r["error"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
