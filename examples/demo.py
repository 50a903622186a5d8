"""The fine-tuning of finetune.py twice from the same seed, untouched and with rewriter, side by side.

Each run has a process of its own, so that neither can change the other's time or memory.
Exits with 1 if the losses part.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

MODES = {"eager": "unoptimised", "rewriter": "rewriter"}
WARM_UP = 5  # steps in which a graph may still be compiled for a new sequence length; left out of tokens/s
TOLERANCE = {"cpu": 1e-2, "cuda": 5e-2}  # relative; fp32 on the CPU, bf16 on the GPU


def reset_peak_memory():
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the highest resident size so far


def peak_memory():
    """Bytes: the allocator's peak on CUDA, else the peak resident size of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def work(mode, steps, batch_size, seed):
    """One run; every step is written to stdout as a line of JSON, and whatever else prints goes to stderr."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(**event):
        print(json.dumps(event), file=events, flush=True)

    import torch
    from finetune import DEVICE, batches, load, train

    tokenizer, model = load(seed)
    if mode == "rewriter":
        import rewriter

        model = rewriter.optimize(model)
    data = list(batches(tokenizer, steps, batch_size, seed))
    send(device=DEVICE, hardware=torch.cuda.get_device_name() if DEVICE == "cuda" else f"{os.cpu_count()} CPU cores")

    reset_peak_memory()
    send(start_memory=peak_memory())
    first_peak, before = 0, time.perf_counter()
    for step, (loss, tokens) in enumerate(train(model, data)):
        seconds = time.perf_counter() - before
        if step + 1 == min(WARM_UP, steps - 1):
            first_peak = peak_memory()
            reset_peak_memory()
        send(loss=loss, tokens=tokens, seconds=seconds)
        before = time.perf_counter()
    send(steady_peak=peak_memory(), peak=max(first_peak, peak_memory()))
    if mode == "rewriter":
        send(report=str(rewriter.report(model)))


def run(mode, args, progress):
    """Starts one run in its own process and follows it; returns what it sent."""
    result = {"losses": [], "tokens": [], "seconds": []}
    task = progress.add_task(f"{MODES[mode]:>11}", total=args.steps, loss="loading the model")
    command = [sys.executable, __file__, "--worker", mode, "--steps", str(args.steps)]
    command += ["--batch-size", str(args.batch_size), "--seed", str(args.seed)]
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as worker:
            for line in worker.stdout:
                event = json.loads(line)
                if "loss" not in event:
                    result |= event
                    continue
                for key, values in (("loss", "losses"), ("tokens", "tokens"), ("seconds", "seconds")):
                    result[values].append(event[key])
                progress.update(task, advance=1, loss=f"loss {event['loss']:.4f}")
        if worker.returncode:
            log.seek(0)
            sys.exit(f"the {MODES[mode]} run failed with exit code {worker.returncode}:\n{log.read()}")
    return result


def figures(result):
    """The lines of the summary: name -> text."""
    speeds = [tokens / seconds for tokens, seconds in zip(result["tokens"], result["seconds"], strict=True)]
    fifth = max(1, len(speeds) // 5)
    return {
        "mean loss, first fifth": f"{mean(result['losses'][:fifth]):.4f}",
        "mean loss, last fifth": f"{mean(result['losses'][-fifth:]):.4f}",
        "first step": f"{result['seconds'][0]:.1f} s",
        "all steps": f"{sum(result['seconds']):.1f} s",
        f"tokens/s, median after step {WARM_UP}": f"{median(speeds[WARM_UP:] or speeds):,.0f}",
        "memory before the first step": f"{result['start_memory'] / 2**20:,.0f} MiB",
        "peak memory": f"{result['peak'] / 2**20:,.0f} MiB",
        f"peak memory after step {WARM_UP}": f"{result['steady_peak'] / 2**20:,.0f} MiB",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2")
    if args.worker:
        return work(args.worker, args.steps, args.batch_size, args.seed)

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    console = Console()
    console.print("LoRA fine-tuning of SmolLM2-135M-Instruct, twice from the same seed\n", highlight=False)
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        eager, ours = (run(mode, args, progress) for mode in MODES)

    print(f"\n{ours['report']}\n")  # it has its own width

    losses = Table("steps", *MODES.values(), "largest difference", title=f"Mean loss on {ours['hardware']}")
    for column in losses.columns:
        column.justify = "right"
    every = max(1, args.steps // 10)
    for start in range(0, args.steps, every):
        old, new = (result["losses"][start : start + every] for result in (eager, ours))
        apart = max(abs(a - b) for a, b in zip(old, new, strict=True))
        steps = f"{start + 1}-{start + len(old)}" if len(old) > 1 else str(start + 1)
        losses.add_row(steps, f"{mean(old):.6f}", f"{mean(new):.6f}", f"{apart:.1e}")
    console.print(losses)

    summary = Table("", *MODES.values())
    for (name, old), new in zip(figures(eager).items(), figures(ours).values(), strict=True):
        summary.add_row(name, old, new)
    console.print(summary)

    parted = max(abs(new - old) / old for old, new in zip(eager["losses"], ours["losses"], strict=True))
    agree = parted <= TOLERANCE[ours["device"]]
    verdict = "the curves agree" if agree else f"more than {TOLERANCE[ours['device']]:.0e}: THE CURVES PART"
    console.print(f"Largest relative difference of a step's loss: {parted:.1e} ({verdict})", highlight=False)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
