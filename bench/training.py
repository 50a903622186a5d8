"""Training steps, ours against eager and peers: one process for each configuration, random weights, one fixed batch.

    python bench/training.py --work qwen2-1.5b-lora,llama-1b-full --profile
    python bench/training.py --work tiny-lora,tiny-full --modes eager,rewriter-eager      # a smoke run on a CPU

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
MODES = ("eager", "compile-blocks", "liger", "liger-compile", "rewriter-eager", "rewriter-inductor")
LOSS_TOLERANCE = 2e-2  # relative to eager's loss after the same steps


def run(task: dict, limit: float, keep_caches: bool) -> dict:
    """One configuration in a process of its own, killed with all its children after `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        environment = dict(os.environ)
        if not keep_caches:  # compile times are those of a first start
            for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
                environment[name] = str(Path(folder) / name.lower())
        command = [sys.executable, str(FOLDER / "training_worker.py"), json.dumps(task), str(out)]
        with log.open("wb") as stream:
            child = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
            try:
                child.wait(limit)
                why = f"ended with code {child.returncode}"
            except subprocess.TimeoutExpired:
                why = f"not done after {limit:g} s"
            finally:
                kill_group(child)
        if out.exists():
            result = json.loads(out.read_text(encoding="utf-8"))
        else:
            result = {**task, "status": "failed", "why": why, "notes": {}}
        if result["status"] == "failed":
            result["log"] = log.read_text(errors="replace")[-4000:]
    return result


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
    ("mode", "mode", "{}"),
    ("ms/step", "median_ms", "{:.1f}"),
    ("tokens/s", "tokens_per_s", "{:.0f}"),
    ("peak GiB", "peak_gib", "{:.2f}"),
    ("first step s", "first_step_s", "{:.1f}"),
    ("GPU busy ms", "gpu_busy_ms", "{:.1f}"),
    ("kernels", "kernels", "{:.0f}"),
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
        flat = {**result, **result.get("kernel_profile", {})}
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


def save(path: Path, results: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": "training", "runs": results}, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="qwen2-1.5b-lora,llama-1b-full", help="comma-separated; see works.py")
    parser.add_argument("--modes", default=",".join(MODES), help=f"comma-separated, of {', '.join(MODES)}")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps between the first one and the timed ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of the blocks")
    parser.add_argument("--profile", action="store_true", help="two further steps under the profiler")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one configuration")
    parser.add_argument("--keep-caches", action="store_true", help="let compilers use what earlier runs left on disk")
    parser.add_argument("--append", action="store_true", help="keep the runs that --out already holds")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/training-<device>-<date>.json")
    args = parser.parse_args()
    args.work, args.modes = args.work.split(","), args.modes.split(",")
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
    results: list[dict] = []
    if args.append and args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))["runs"]
    for work in args.work:
        for mode in args.modes:
            print(f"{work} {mode} ...", file=sys.stderr, flush=True)
            results.append(run({"work": work, "mode": mode, **shared}, args.limit, args.keep_caches))
            judge(results)
            path = args.out or default_path(results)
            save(path, results)  # after each one: what was measured stays, whatever happens to the rest
    print(f"{path}\n{table(results)}")
    return int(any(r["status"] in ("failed", "void") for r in results))


if __name__ == "__main__":
    sys.exit(main())
