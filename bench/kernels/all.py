"""Every kernel family, each in a process of its own with a time limit; a table of all of them at the end.

    OUT=/some/folder python bench/kernels/all.py --limit 240
    OUT=/some/folder python bench/kernels/all.py --families rms_norm,glu --device cpu       # a smoke run

A family that fails or takes too long does not end the run; what it had measured until then is in its JSON and in the
table. Exits with 1 if one did not end well; missed targets are printed, and are no failure of the run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import verdict

FOLDER = Path(__file__).parent
OUT = Path(os.environ.get("OUT", "."))
FAMILIES = (
    "rms_norm", "layer_norm", "rotary", "glu", "cross_entropy",
    "attention", "linear_cross_entropy", "lora", "dequantize_4bit",
)  # fmt: skip
COLUMNS = ("family", "status", "seconds", "rows", "failed", "least of a copy", "most of a peer's time", "misses")


def run(family, device, limit):
    """(status, seconds) of the family's script, killed with all its children after `limit` seconds."""
    (OUT / f"{family}.json").unlink(missing_ok=True)  # of an earlier run
    start = time.monotonic()
    command = [sys.executable, str(FOLDER / f"{family}.py"), "--device", device]
    child = subprocess.Popen(command, start_new_session=True)
    try:
        code = child.wait(limit)
        status = "ok" if code == 0 else f"ended with code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        status = f"not done after {limit:g} s"
    return status, time.monotonic() - start


def rows_of(results):
    """The rows of a family's JSON; attention's lie by configuration and candidate."""
    configs = results.get("configs", {}).values()
    return results.get("rows") or [row for config in configs for row in config.values()]


def line(family, status, seconds):
    path = OUT / f"{family}.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = rows_of(results)
    failed = sum("error" in row for row in rows)
    shares, slower = verdict.worst(rows)
    cells = [family, status, f"{seconds:.0f}", str(len(rows)), str(failed)]
    return [*cells, shares, slower, str(len(results["misses"])) if "misses" in results else "-"], results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one family")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a smoke run with tiny shapes")
    arguments = parser.parse_args()
    families = arguments.families.split(",")
    if unknown := set(families) - set(FAMILIES):
        parser.error(f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    lines, missed, good = [COLUMNS], [], True
    for family in families:
        print(f"== {family}", flush=True)
        status, seconds = run(family, arguments.device, arguments.limit)
        cells, results = line(family, status, seconds)
        lines.append(cells)
        missed += [f"MISS {family} {miss}" for miss in results.get("misses", [])]
        good = good and status == "ok"
    print("==", *missed, verdict.table(lines), sep="\n", flush=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
