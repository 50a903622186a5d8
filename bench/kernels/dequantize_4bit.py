"""Unpacking of weights in 4 bits against bitsandbytes and against a plain copy, on one GPU.

    OUT=/some/folder python bench/kernels/dequantize_4bit.py

Bytes are what has to be read and written once: the packed weight, its scales, the result. The ceiling is a copy of as
many bytes, which takes turns with both. Calls are queued without waiting for one another, with the cache of the GPU
overwritten in between. Numbers are checked first: the two results are equal in every bit.
"""

import argparse

import bitsandbytes.functional
import measure
import torch

from rewriter.kernels import dequantize_4bit as family

SHAPES = ((8960, 1536), (4096, 4096), (14336, 4096))
TINY = ((64, 64),)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def case(machine, shape, quant_type, nested, dtype):
    """(our packed weight, bitsandbytes' arguments)."""
    matrix = torch.randn(shape, device=machine.device, generator=machine.generator()).to(dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(matrix, quant_type=quant_type, compress_statistics=nested)
    if nested:
        scales = state.state2.absmax, state.absmax, state.state2.code, state.offset
        nested_blocksize = state.state2.blocksize
    else:
        scales, nested_blocksize = (state.absmax, None, None, None), 0
    kind = shape, state.blocksize, nested_blocksize, quant_type, dtype
    return family.Packed4bit(packed, *scales, *kind), (packed, state)


def row(machine, shape, quant_type, nested, dtype):
    weight, theirs = case(machine, shape, quant_type, nested, dtype)
    results = family.dequantize_4bit(weight), bitsandbytes.functional.dequantize_4bit(*theirs)
    assert torch.equal(*results)
    count = measure.nbytes(*weight.tensors(), results[0])
    times = machine.milliseconds(
        machine.copy(count),
        lambda: family.dequantize_4bit(weight),
        lambda: bitsandbytes.functional.dequantize_4bit(*theirs),
        repeat=30,
    )
    times = dict(zip(("copy", "ours", "bitsandbytes"), times, strict=True))
    rates = {name: count / time / 1e6 for name, time in times.items()}
    share = {name: rates[name] / rates["copy"] for name in ("ours", "bitsandbytes")}
    return {"bytes": count, "ms": times, "GB/s": rates, "of a copy": share}


def text(row):
    ours, theirs = (f"{row['ms'][n] * 1e3:6.1f} us, {row['of a copy'][n]:6.1%}" for n in ("ours", "bitsandbytes"))
    size, rate = "x".join(map(str, row["shape"])), f"{row['GB/s']['copy']:.0f} GB/s"
    return f"{size:>14} {row['type']:>5} {row['nested']!s:>6} {row['dtype']:>9} {rate:>10} {ours:>19} {theirs:>19}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a smoke run with a tiny shape")
    machine = measure.Machine(parser.parse_args().device)
    results = {**machine.environment("bitsandbytes"), "rows": []}
    print(results["device"], results["versions"])
    print(f"{'shape':>14} {'type':>5} {'nested':>6} {'dtype':>9} {'copy':>10} {'ours':>19} {'bitsandbytes':>19}")
    for dtype in DTYPES:
        for shape in SHAPES if machine.gpu else TINY:
            for quant_type, nested in (("nf4", True), ("nf4", False), ("fp4", True)):
                options = {"shape": shape, "type": quant_type, "nested": nested, "dtype": str(dtype)[len("torch.") :]}
                try:
                    found = options | row(machine, shape, quant_type, nested, dtype)
                    print(text(found), flush=True)
                except Exception as error:  # one that fails must not end the run
                    found = options | {"error": f"{type(error).__name__}: {error}"[:500]}
                    print(found, flush=True)
                results["rows"].append(found)
                measure.save(results, "dequantize_4bit")


if __name__ == "__main__":
    main()
