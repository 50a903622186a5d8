"""Registers, spills and shared memory of the memory-bound kernels, compiled for each target without a GPU.

    python bench/spills.py [--out FILE] [--targets 80,89,90,gfx942]

Fails where anything spills. The shapes are those of current models; everything is bfloat16. `per_processor` is how many
programs a multiprocessor of an H100 holds by registers, threads and shared memory alone.
"""

import argparse
import functools
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cpu")]

import test_kernel_compile as cases  # noqa: E402
from compiling import SHARED_MEMORY, compiled, record_launches  # noqa: E402

HIDDEN = (1536, 2048, 4096, 8192)
INTERMEDIATE = (8960, 14336)
CLASSES = (128256, 151936)


def shapes():
    """name -> function of a dtype that launches the kernels of one shape."""
    found = {}

    def add(name, function, sizes, **options):
        found.update({f"{name} {n}": functools.partial(function, n, **options) for n in sizes})

    add("rms_norm", cases.rms_norm_launches, (128, *HIDDEN))
    add("add_rms_norm", cases.add_rms_norm_launches, HIDDEN)
    add("layer_norm", cases.layer_norm_launches, HIDDEN)
    add("add_layer_norm", cases.add_layer_norm_launches, HIDDEN)
    add("rotary", cases.rotary_launches, (64, 80, 128))
    add("rotary, interleaved,", cases.rotary_launches, (64, 80, 128), interleaved=True)
    for activation in ("silu", "gelu_tanh"):
        add(f"glu {activation}", cases.glu_launches, INTERMEDIATE, activation=activation)
    add("glu clamped, interleaved", cases.glu_clamped_launches, INTERMEDIATE, interleaved=True)
    add("cross_entropy", cases.cross_entropy_launches, CLASSES)
    add("cross_entropy of rows", cases.cross_entropy_launches, CLASSES, reduction="none")
    add("cross_entropy, soft cap", cases.cross_entropy_launches, CLASSES, softcap=30.0)
    return found


def per_processor(used, warps):
    registers = -(-used["registers"] // 8) * 8 * 32 * warps
    return min(65536 // registers, 64 // warps, 32, (227 << 10) // (used["shared_bytes"] + 1024))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "spills.json")
    parser.add_argument("--targets", default="80,89,90,gfx942")
    options = parser.parse_args()
    launches, results, spilled = record_launches(setattr, cases.FAMILIES), [], False
    for target in (int(t) if t.isdigit() else t for t in options.targets.split(",")):
        torch.version.hip = "6.4" if target == "gfx942" else None
        for name, launch_all in shapes().items():
            launches.clear()
            launch_all(torch.bfloat16)
            for launch in launches:
                with tempfile.TemporaryDirectory() as folder:
                    _, used = compiled(launch, target, Path(folder))
                warps = launch.keywords["num_warps"]
                family = launch.kernel.__module__.split(".")[-1].removesuffix("_triton")
                kernel = f"{family}.{launch.kernel.__name__}"
                row = {"target": target, "shape": name, "kernel": kernel, "warps": warps, **used}
                if target == 90:
                    row["per_processor"] = per_processor(used, warps)
                row["fits"] = used["shared_bytes"] <= SHARED_MEMORY[target] << 10
                if row not in results:  # a second launch of the same kernel
                    results.append(row)
                if used["spilled"] or not row["fits"]:
                    spilled = True
                    print(f"SPILLS {target} {name} {kernel}: {used}", flush=True)
        print(f"{target}: {sum(r['target'] == target for r in results)} kernels", flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    rows = ",\n    ".join(json.dumps(row) for row in results)
    options.out.write_text(f'{{\n  "versions": {json.dumps(versions)},\n  "kernels": [\n    {rows}\n  ]\n}}\n')
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
