"""Training steps, ours against eager and peers: one process for each configuration, random weights, one fixed batch.

    python bench/training.py --work qwen2-1.5b-lora,llama-1b-full --profile
    python bench/training.py --work llama-8b-qlora --checkpointing --modes eager,unsloth,rewriter-inductor --profile
    python bench/training.py --work tiny-lora,tiny-full --modes eager,compile,rewriter-eager    # a smoke run on a CPU

bench/README.md says what is measured, and when a run is void.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import works

FOLDER = Path(__file__).parent
MODES = (
    "eager", "compile", "compile-blocks", "compile-blocks-liger", "liger", "liger-compile", "unsloth",
    "rewriter-eager", "rewriter-inductor",
)  # fmt: skip
FLOOR_KEYS = ("work", "checkpointing", "device")
LOSS_TOLERANCE = 2e-2  # relative to eager's loss after the same steps


def run(task: dict, limit: float, keep_caches: bool) -> dict:
    """One configuration in a process of its own, killed with all its children after `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        environment = dict(os.environ)
        if not keep_caches:  # compile times are those of a first start
            for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
                environment[name] = str(Path(folder) / name.lower())
        why = alone("training_worker.py", task, out, log, limit, environment)
        if out.exists():
            result = json.loads(out.read_text(encoding="utf-8"))
        else:
            result = {**task, "status": "failed", "why": why, "notes": {}}
        if result["status"] == "failed":
            result["log"] = log.read_text(errors="replace")[-4000:]
    result["variant"] = variant(result)
    return result


def alone(script: str, task: dict, out: Path, log: Path, limit: float, environment: dict) -> str:
    """Run a script of this folder for at most `limit` seconds. Returns how it ended."""
    command = [sys.executable, str(FOLDER / script), json.dumps(task), str(out)]
    with log.open("wb") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
        try:
            child.wait(limit)
            return f"ended with code {child.returncode}"
        except subprocess.TimeoutExpired:
            return f"not done after {limit:g} s"
        finally:
            kill_group(child)


def variant(result: dict) -> str:
    """What tells a run from others of its mode: the peer's version, what ours leaves out."""
    parts = [f"without {', '.join(result['exclude'])}"] if result.get("exclude") else []
    if result.get("select"):
        parts.append(f"select {result['select']}")
    if result["mode"] == "unsloth" and "unsloth" in result["notes"]:
        parts.append(result["notes"]["unsloth"])
    return ", ".join(parts)


def measure_floors(task: dict, limit: float) -> list[dict]:
    """The floor of each work (floor.py), measured in a process of its own; empty where that failed."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "floors.json", Path(folder) / "log"
        why = alone("floor.py", task, out, log, limit, dict(os.environ))
        floors = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        if len(floors) < len(task["works"]) or any(f["floor_ms"] is None for f in floors):
            print(f"floor: {why}\n{log.read_text(errors='replace')[-2500:]}", file=sys.stderr, flush=True)
    return floors


def put_floors(results: list[dict], floors: list[dict]) -> None:
    """Set `floor_ms` of each run that a floor belongs to."""
    known = {tuple(f[name] for name in FLOOR_KEYS): f["floor_ms"] for f in floors}
    for result in results:
        result["floor_ms"] = known.get(tuple(result[name] for name in FLOOR_KEYS))


def kill_group(child: subprocess.Popen) -> None:
    """The process and the compile workers it may have left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def judge(results: list[dict]) -> None:
    """Void what did not train as eager does. Sets `status`, `why` and `speedup` (step time of eager over this one)."""
    eager = {same(r): r for r in results if r["mode"] == "eager" and "loss" in r}
    for result in results:
        if result["status"] not in ("ok", "void"):
            continue
        base = eager.get(same(result))
        why = reason_to_void(result, base)
        result.update(status="void" if why else "ok", why=why)
        result["speedup"] = base["median_ms"] / result["median_ms"] if base else None


def same(result: dict) -> tuple:
    """Runs with equal keys differ in nothing but the mode."""
    return tuple(result[name] for name in ("work", "checkpointing", "device", "seed", "warmup", "steps"))


def reason_to_void(result: dict, base: dict | None) -> str:
    loss, norm = result["loss"], result["grad_norm"]
    if not math.isfinite(loss) or not math.isfinite(norm):
        return f"loss {loss}, gradient norm {norm}"
    if norm == 0.0:
        return "the gradient is zero"
    if base is None:
        return "no eager run to compare with"
    if abs(loss - base["loss"]) > LOSS_TOLERANCE * abs(base["loss"]):
        return f"loss {loss:.4f}, eager's is {base['loss']:.4f}"
    if result["parameters_with_gradient"] != base["parameters_with_gradient"]:
        counts = result["parameters_with_gradient"], base["parameters_with_gradient"]
        return f"{counts[0]} parameters have a gradient, in eager {counts[1]}"
    return ""


COLUMNS = (
    ("work", "work", "{}"),
    ("mode", "name", "{}"),
    ("ms/step", "median_ms", "{:.1f}"),
    ("floor ms", "floor_ms", "{:.1f}"),
    ("tokens/s", "tokens_per_s", "{:.0f}"),
    ("peak GiB", "peak_gib", "{:.2f}"),
    ("first step s", "first_step_s", "{:.1f}"),
    ("GPU busy ms", "gpu_busy_ms", "{:.1f}"),
    ("kernels", "kernels", "{:.0f}"),
    ("host ms", "host_ms", "{:.1f}"),
    ("loss", "loss", "{:.4f}"),
    ("grad norm", "grad_norm", "{:.4f}"),
    ("x eager", "speedup", "{:.2f}"),
    ("", "status", "{}"),
    ("", "why", "{}"),
)


def table(results: list[dict]) -> str:
    """Aligned text, one line a configuration; `-` where nothing was measured."""
    rows = [[title for title, _, _ in COLUMNS]]
    for result in results:
        name = f"{result['mode']} {result.get('variant', '')}".strip()
        flat = {**result, **result.get("kernel_profile", {}), "name": name}
        cells = [form.format(v) if (v := flat.get(key)) is not None else "-" for _, key, form in COLUMNS]
        rows.append([*cells[:-1], cells[-1].replace("\n", " ")[:80]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    words = (0, 1, len(COLUMNS) - 2, len(COLUMNS) - 1)
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def default_path(results: list[dict]) -> Path:
    device = next((r["environment"]["device"] for r in results if "environment" in r), "unknown")
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return FOLDER / "results" / f"training-{slug}-{datetime.date.today()}.json"


def save(path: Path, results: list[dict], floors: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = {"benchmark": "training", "runs": results, "floors": floors}
    path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="qwen2-1.5b-lora,llama-1b-full", help="comma-separated; see works.py")
    parser.add_argument("--modes", default=",".join(MODES), help=f"comma-separated, of {', '.join(MODES)}")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps between the first one and the timed ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of the blocks")
    parser.add_argument("--profile", action="store_true", help="two further steps under the profiler")
    parser.add_argument("--exclude", default="", help="comma-separated patterns that the rewriter modes leave out")
    parser.add_argument("--select", default="", help="passed to rewriter.optimize by the rewriter modes")
    parser.add_argument("--no-floor", action="store_true", help="don't measure the ceilings and the floor")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one configuration")
    parser.add_argument("--keep-caches", action="store_true", help="let compilers use what earlier runs left on disk")
    parser.add_argument("--append", action="store_true", help="keep the runs that --out already holds")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/training-<device>-<date>.json")
    args = parser.parse_args()
    args.work, args.modes = args.work.split(","), args.modes.split(",")
    args.exclude = [name for name in args.exclude.split(",") if name]
    try:
        for work in args.work:
            works.parse(work)
    except ValueError as error:
        parser.error(str(error))
    if unknown := set(args.modes) - set(MODES):
        parser.error(f"unknown mode {sorted(unknown)[0]!r}; allowed are {', '.join(MODES)}")
    if args.append and not args.out:
        parser.error("--append needs --out")
    return args


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> int:
    args = arguments()
    shared = {name: getattr(args, name) for name in ("steps", "warmup", "seed", "checkpointing", "profile")}
    shared["device"] = args.device or default_device()
    ours = {"exclude": args.exclude, "select": args.select}
    results: list[dict] = []
    floors: list[dict] = []
    if args.append and args.out.exists():
        earlier = json.loads(args.out.read_text(encoding="utf-8"))
        results, floors = earlier["runs"], earlier.get("floors", [])
    if not args.no_floor:
        print("floor ...", file=sys.stderr, flush=True)
        task = {"works": args.work, "checkpointing": args.checkpointing, "device": shared["device"]}
        floors = [*floors, *measure_floors(task, args.limit)]  # the later one of two counts
    for work in args.work:
        for mode in args.modes:
            print(f"{work} {mode} ...", file=sys.stderr, flush=True)
            task = {"work": work, "mode": mode, **shared, **(ours if mode.startswith("rewriter") else {})}
            results.append(run(task, args.limit, args.keep_caches))
            if "log" in results[-1]:
                print(results[-1]["log"][-2500:], file=sys.stderr, flush=True)
            judge(results)
            put_floors(results, floors)
            path = args.out or default_path(results)
            save(path, results, floors)  # after each one: what was measured stays, whatever happens to the rest
    print(f"{path}\n{table(results)}")
    return int(any(r["status"] in ("failed", "void") for r in results))


if __name__ == "__main__":
    sys.exit(main())
