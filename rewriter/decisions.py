"""Where rewrites pay: what ships with the package, and the figures it was decided on.

The first row that speaks of a place holds. A place that no row speaks of is rewritten: it was not measured by itself.
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
    Decision("linear_4bit", ANY, "cpu", False, "a library's code for vector units, against PyTorch's operators",
             library=True),
    Decision("lora", ANY, "cpu", False, "a library's code for vector units, against PyTorch's operators", library=True),
    Decision("layer_norm", ANY, "cpu", False, "one operator of PyTorch's, against several of them", library=True),
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
