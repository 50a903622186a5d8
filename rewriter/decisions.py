"""Where rewrites pay: what ships with the package, and the figures it was decided on.

The first row that speaks of a place holds. One that no row speaks of is rewritten: it was not measured by itself, as
on GPUs neither norms, rotary, glu and cross_entropy (only whole steps with all of them) nor weights in 4 bits were.
Figures are of forward and backward, the rewrite's and then the original's; `source` is a file in `bench/results/`.
With select="measure" this table only says what happens where measuring fails.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ANY = "any"


@dataclass(frozen=True)
class Decision:
    """One row.

    pattern:  its name
    executor: "eager", "inductor" or "any"
    device:   "cpu", "cuda", a compute capability such as "9.0" (H100, H200), or "any"
    apply:    whether places are rewritten
    figures:  why, in words
    source:   the file that the figures are from, or "" where nothing was measured
    library:  only for places where the model calls a library's own operator for all of it
    """

    pattern: str
    executor: str
    device: str
    apply: bool
    figures: str
    source: str = ""
    library: bool = False


_HEAD, _TURNS = "linear_cross_entropy-h100-2026-11-25.json", "linear_cross_entropy-h100-2026-11-25-turns.json"
_CPU = "selection-cpu-2026-11-28.json"  # 512 tokens of width 512 in float32
_LORA, _ATTENTION = "lora-h100-2026-11-25.json", "attention-h100-2026-11-25.json"

DECISIONS = (
    Decision("linear_cross_entropy", "inductor", "9.0", True,
             "8192 x 1536 x 151,936: frozen 12.2 ms for 14.4, trained 17.8 for 19.7; 0.6 GiB beside for 2.3", _TURNS),
    Decision("linear_cross_entropy", "eager", "9.0", True,
             "8192 x 1536 x 151,936: frozen 11.8 ms for 30.7, trained 18.4 for 35.7; 0.6 GiB beside for 14", _HEAD),
    Decision("attention", "eager", "9.0", True,
             "4 x 12 (2) x 2048 x 128, causal: soft cap 2.05 ms for 9.56, sink 1.61 for 10.9; 25-57 MiB for 3.2 GiB",
             _ATTENTION),
    Decision("attention", "inductor", "9.0", True,
             "soft cap 2.05 ms, flex_attention 2.21; sink 1.61 and 1.42; the original compiled was not measured",
             _ATTENTION),
    Decision("lora", "inductor", "9.0", True,
             "rank 16: gate and up 4096 wide 2.65 ms for 3.37, q, k, v 1536 wide 0.26 for 0.56, down 8960 0.77, 0.98",
             _LORA),
    Decision("lora", "eager", "9.0", True,
             "rank 16: gate and up 4096 wide 2.67 ms for 3.45, q, k, v 1536 wide 0.30 for 0.59, down 8960 0.79, 0.99",
             _LORA),
    # On a CPU, PyTorch's operators stand in for the kernels. Beside a library's own operator that is no gain. Elsewhere
    # they are mostly slower and keep less for backward; they run, so that a model does on a CPU what it does on a GPU.
    Decision("layer_norm", "eager", "cpu", False, "34.9 ms for 1.9", _CPU, library=True),
    Decision("layer_norm", "inductor", "cpu", False, "not measured: as under eager", library=True),
    Decision("linear_4bit", "eager", "cpu", False, "79.8 ms for 58.5", _CPU, library=True),
    Decision("linear_4bit", "inductor", "cpu", False, "not measured: as under eager", library=True),
    Decision("linear_cross_entropy", ANY, "cpu", False, "not measured: as linear_4bit", library=True),
    Decision("lora", "eager", "cpu", False, "67.4 ms for 51.2", _CPU, library=True),
    Decision("lora", "inductor", "cpu", False, "not measured: as under eager", library=True),
    Decision("lora", "eager", "cpu", True, "40.1 ms for 50.7", _CPU),
    Decision("rms_norm", "eager", "cpu", True, "28.6 ms for 16.0 with a weight, 19.9 for 19.8 without", _CPU),
    Decision("add_rms_norm", "eager", "cpu", True, "33.6 ms for 21.2; 1 MiB for 2", _CPU),
    Decision("glu", "eager", "cpu", True, "77.2 ms for 40.3; nothing for 2 MiB", _CPU),
    Decision("rotary", "eager", "cpu", True, "35.6 ms for 34.0", _CPU),
    Decision("attention", "eager", "cpu", True, "soft cap 296 ms for 107; 1 MiB for 7", _CPU),
    Decision("cross_entropy", "eager", "cpu", True, "249 ms for 100; 16 MiB for 16", _CPU),
    Decision("linear_cross_entropy", "eager", "cpu", True,
             "trained 496 ms for 470, 17 MiB for 16; frozen 398 ms for 318, 1 MiB for 16", _CPU),
)  # fmt: skip


def decision(pattern: str, executor: str, device: torch.device, library: bool = False) -> Decision:
    """The row for a pattern's places under an executor ("eager" or "inductor"), on a device.

    library: whether the model calls a library's operator there
    """
    names = {ANY, device.type}
    if device.type == "cuda" and torch.cuda.is_available():
        names.add(".".join(map(str, torch.cuda.get_device_capability(device))))
    for row in DECISIONS:
        if (
            row.pattern == pattern
            and row.executor in (ANY, executor)
            and row.device in names
            and library >= row.library
        ):
            return row
    return Decision(pattern, executor, device.type, True, "not measured by itself")
