"""One configuration of the training benchmark, in a process of its own: `training.py` starts it.

python bench/training_worker.py '{"work": "tiny-lora", "mode": "eager", ...}' result.json
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))  # an installed rewriter comes first

import works
from kernel_profile import ON_GPU, our_kernels, summary

LEARNING_RATE = 1e-4
GIB = 2**30
PROFILED_STEPS, HOST_STEPS = 2, 5


class NotInstalled(Exception):
    """A mode needs a package that isn't there."""


# ---- modes ---------------------------------------------------------------------------------------------------------


def installed(name: str) -> str:
    """The version of a package; NotInstalled where it isn't there."""
    try:
        return version(name)
    except PackageNotFoundError as error:
        raise NotInstalled(name) from error


def patch_with_liger(work: str, only_loss: bool) -> str:
    """Liger's kernels for the work's model type, or its fused head and loss alone; to be called before building."""
    number = installed("liger-kernel")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    others = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy"), False) if only_loss else {}
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[works.configuration(works.parse(work)[0]).model_type]
    apply(fused_linear_cross_entropy=True, **others)
    return number


def counting_backend(notes: dict) -> Callable:
    """Inductor, which notes how many graphs it was given."""
    from torch._inductor.compile_fx import compile_fx

    # By default the ninth graph for one piece of code runs eagerly without a word.
    torch._dynamo.config.recompile_limit = 64
    notes["graphs"] = 0

    def backend(gm, example_inputs):
        notes["graphs"] += 1
        return compile_fx(gm, example_inputs)

    return backend


def compile_blocks(model: nn.Module, notes: dict) -> None:
    """torch.compile for each decoder block; one backend object, so that they share graphs."""
    backend = counting_backend(notes)
    for block in works.blocks(model):
        block.forward = torch.compile(block.forward, backend=backend)


def build(task: dict, notes: dict, folder: Path) -> nn.Module:
    """The model of one configuration, made ready in the configuration's mode."""
    mode = task["mode"]
    if works.parse(task["work"])[1] == "qlora":
        notes["bitsandbytes"] = installed("bitsandbytes")
    if mode == "unsloth":
        import unsloth_mode

        notes["unsloth"] = installed("unsloth")
        return unsloth_mode.build(task, notes, folder)
    if "liger" in mode:
        notes["liger-kernel"] = patch_with_liger(task["work"], only_loss=mode == "compile-blocks-liger")
    model = works.build(task["work"], task["device"], task["seed"], task["checkpointing"])
    if mode == "compile":
        model.compile(backend=counting_backend(notes))
    if mode in ("compile-blocks", "compile-blocks-liger", "liger-compile"):
        compile_blocks(model, notes)
    if mode.startswith("rewriter"):
        import rewriter

        options = {name: task[name] for name in ("exclude", "select") if task.get(name)}
        model = rewriter.optimize(model, executor=mode.removeprefix("rewriter-"), **options)
    return model


# ---- measuring -----------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> float | None:
    """GiB allocated at the highest point since the last reset."""
    return torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None


def measure(task: dict, result: dict, folder: Path) -> None:
    """Fill `result`: losses, times in milliseconds, memory in GiB. `folder` is for what a mode must write."""
    device, notes = task["device"], result["notes"]
    model = build(task, notes, folder)
    batch = works.batch(task["work"], device, task["seed"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    result["losses"] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        result["losses"].append(loss.detach())

    result["trained_parameters"] = sum(p.numel() for p in parameters)
    result["trained_dtypes"] = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    result["memory_before_gib"] = peak(device)
    result["first_step_s"] = timed(step, device)
    for _ in range(task["warmup"]):
        step()
    overall = peak(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [1e3 * timed(step, device) for _ in range(task["steps"])]
    result["peak_gib"] = peak(device)
    result["peak_overall_gib"] = max(overall, result["peak_gib"]) if device == "cuda" else None
    result["step_ms"], result["median_ms"] = times, statistics.median(times)
    result["tokens_per_s"] = 1e3 * batch["input_ids"].numel() / result["median_ms"]
    result["losses"] = [loss.item() for loss in result["losses"]]
    result["loss"] = result["losses"][-1]
    result["grad_norm"], result["parameters_with_gradient"] = gradient_norm(parameters)
    if device == "cuda":
        result["host_ms"] = statistics.median(1e3 * issued(step) for _ in range(HOST_STEPS))
    if task["profile"]:
        result["kernel_profile"] = profile(step, device, our_kernels() if task["mode"].startswith("rewriter") else ())
    del result["losses"][1 + task["warmup"] + task["steps"] :]
    if task["mode"].startswith("rewriter"):
        result["report"] = report_of(model)


def timed(step: Callable[[], None], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def issued(step: Callable[[], None]) -> float:
    """Seconds from an idle GPU until the host has issued a whole step, without waiting for the GPU to finish it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent


def gradient_norm(parameters: list[nn.Parameter]) -> tuple[float, int]:
    """The norm over all gradients, and how many parameters have one that isn't zero."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    if not norms:
        return 0.0, 0
    stacked = torch.stack(norms)
    return torch.linalg.vector_norm(stacked).item(), int((stacked != 0).sum())


def profile(step: Callable[[], None], device: str, ours: Collection[str]) -> dict:
    """Busy time of the GPU, number of kernels, time by kind and the most expensive ones, for one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return summary([e for e in events if e.get("cat") in ON_GPU], PROFILED_STEPS, frozenset(ours))


def report_of(model: nn.Module) -> dict:
    """What rewriter did, without the proofs' figures."""
    import rewriter

    report = rewriter.report(model)
    full = report.to_dict()
    return {
        "coverage": {name: list(counts) for name, counts in report.coverage().items()},
        **{name: full[name] for name in ("graphs", "recompiles", "near_misses", "graph_breaks", "fallbacks")},
    }


def main() -> None:
    task, out = json.loads(sys.argv[1]), Path(sys.argv[2]).resolve()
    result: dict = {**task, "status": "ok", "why": "", "notes": {}}
    try:
        from rewriter.environment import environment

        result["environment"] = environment()
        measure(task, result, out.parent)
    except NotInstalled as error:
        result.update(status="not installed", why=str(error))
    except Exception as error:  # the parent puts it into the table
        traceback.print_exc()
        result.update(status="failed", why=f"{type(error).__name__}: {str(error).strip()[:500]}")
        result.pop("losses", None)
    out.write_text(json.dumps(result, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
