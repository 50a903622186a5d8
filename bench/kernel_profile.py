"""What a profile says about the GPU: busy time, launches, and time by kind of kernel, by the kernels' names."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from pathlib import Path

TOP_KERNELS = 15
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")

# The first that is found in a name decides.
_LIBRARIES = (
    ("attention", r"fmha|flash|sdpa|attention|cudnn::fusion"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|xmma|splitK|gemv|dot_kernel|wgmma"),
    ("dequantize", r"dequantize|quantize.*blockwise|kgemm_4bit"),
    ("optimizer", r"multi_tensor_apply|fused_adam|FusedAdam"),
    ("copy", r"^Memcpy|^Memset|copy_kernel|copy_device|CatArray"),
)
_ATEN = re.compile(
    r"elementwise|reduce|softmax|nll_loss|index|embedding|sort|scan|gather|scatter|arange|fill|norm", re.I
)
_PLAIN = re.compile(r"[A-Za-z_]\w*$")  # Triton's names have neither templates nor arguments
_KERNEL = re.compile(r"^@(?:\w+\.)?(?:triton\.)?jit\b[^\n]*\n(?:@[^\n]*\n)*def (\w+)", re.M)
KINDS = ("matmul", "attention", "ours", "triton", "elementwise", "dequantize", "optimizer", "copy", "other")


@cache
def our_kernels() -> frozenset[str]:
    """Names of the kernels that kernels/ of this source tree defines."""
    folder = Path(__file__).parents[1] / "kernels"
    return frozenset(name for file in folder.glob("*.py") for name in _KERNEL.findall(file.read_text(encoding="utf-8")))


def kind(name: str, ours: frozenset[str] = frozenset()) -> str:
    """One of KINDS for a kernel's name: a product of ours is `ours`, a template of Inductor's is what it does."""
    if name in ours:
        return "ours"
    if name.startswith("triton_tem"):
        return "attention" if "attention" in name else "matmul"
    if name.startswith("triton_"):
        return "triton"
    for what, pattern in _LIBRARIES:
        if re.search(pattern, name):
            return what
    if _PLAIN.match(name):
        return "triton"
    return "elementwise" if _ATEN.search(name) else "other"


def summary(events: list[dict], steps: int, ours: frozenset[str] = frozenset()) -> dict:
    """Of the events of a trace (microseconds) that ran on the GPU: their union, count, and totals by name, a step.

    `ours` are the names to count as ours: what another library calls the same is not.
    """
    total, calls, kinds = defaultdict(float), defaultdict(int), dict.fromkeys(KINDS, 0.0)
    busy, until = 0.0, 0.0
    for event in sorted(events, key=lambda e: e["ts"]):
        start, end = event["ts"], event["ts"] + event["dur"]
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
        total[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    for name, duration in total.items():
        kinds[kind(name, ours)] += duration
    top = sorted(total, key=total.__getitem__, reverse=True)[:TOP_KERNELS]
    return {
        "gpu_busy_ms": busy / 1e3 / steps,
        "kernels": len(events) / steps,
        "ms_by_kind": {what: spent / 1e3 / steps for what, spent in kinds.items()},
        "top": [
            {"name": n, "kind": kind(n, ours), "ms": total[n] / 1e3 / steps, "calls": calls[n] / steps} for n in top
        ],
    }
