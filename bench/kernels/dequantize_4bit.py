"""Unpacking of weights in 4 bits against bitsandbytes and against a plain copy, on one GPU.

    OUT=/some/folder python bench/kernels/dequantize_4bit.py

Bytes are what has to be read and written once: the packed weight, its scales, the result. The ceiling is a copy of as
many bytes, measured in the same run. Every time is the median of calls that are queued without waiting for one another,
with the cache of the GPU overwritten in between. Numbers are checked first: the two results are equal in every bit.
"""

import importlib.metadata
import json
import os
import statistics
import sys
from pathlib import Path

import bitsandbytes.functional
import torch

sys.path.insert(0, os.getcwd())
from rewriter.kernels import dequantize_4bit as family

SHAPES = ((8960, 1536), (4096, 4096), (14336, 4096))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICE = "cuda"
OUT = Path(os.environ.get("OUT", "."))


def case(shape, quant_type, nested, dtype):
    """(our packed weight, bitsandbytes' arguments)."""
    matrix = torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).to(dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(matrix, quant_type=quant_type, compress_statistics=nested)
    if nested:
        scales = state.state2.absmax, state.absmax, state.state2.code, state.offset
        nested_blocksize = state.state2.blocksize
    else:
        scales, nested_blocksize = (state.absmax, None, None, None), 0
    kind = shape, state.blocksize, nested_blocksize, quant_type, dtype
    return family.Packed4bit(packed, *scales, *kind), (packed, state)


def needed_bytes(weight):
    read = sum(t.numel() * t.element_size() for t in weight.tensors() if t is not None)
    return read + weight.shape[0] * weight.shape[1] * weight.dtype.itemsize


def milliseconds(function, flush, repeat=30):
    for _ in range(5):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    for start, end in events:
        torch.cuda._sleep(1_000_000)  # cycles: until then the host has launched what follows
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def row(shape, quant_type, nested, dtype, flush):
    weight, theirs = case(shape, quant_type, nested, dtype)
    assert torch.equal(family.dequantize_4bit(weight), bitsandbytes.functional.dequantize_4bit(*theirs))
    count = needed_bytes(weight)
    source = torch.empty(count // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = {
        "copy": milliseconds(lambda: target.copy_(source), flush),
        "ours": milliseconds(lambda: family.dequantize_4bit(weight), flush),
        "bitsandbytes": milliseconds(lambda: bitsandbytes.functional.dequantize_4bit(*theirs), flush),
    }
    options = {"shape": shape, "type": quant_type, "nested": nested, "dtype": str(dtype).removeprefix("torch.")}
    rates = {name: count / time / 1e6 for name, time in times.items()}
    share = {name: rates[name] / rates["copy"] for name in ("ours", "bitsandbytes")}
    return {**options, "bytes": count, "ms": times, "GB/s": rates, "of a copy": share}


def main():
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "bitsandbytes")}
    results = {"device": torch.cuda.get_device_name(), "versions": versions, "rows": []}
    print(results["device"], versions)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    print(f"{'shape':>14} {'type':>5} {'nested':>6} {'dtype':>9} {'copy':>10} {'ours':>19} {'bitsandbytes':>19}")
    for dtype in DTYPES:
        for shape in SHAPES:
            for quant_type, nested in (("nf4", True), ("nf4", False), ("fp4", True)):
                found = row(shape, quant_type, nested, dtype, flush)
                results["rows"].append(found)
                ours, theirs = (
                    f"{found['ms'][name] * 1e3:6.1f} us, {found['of a copy'][name]:6.1%}"
                    for name in ("ours", "bitsandbytes")
                )
                size, rate = "x".join(map(str, shape)), f"{found['GB/s']['copy']:.0f} GB/s"
                print(
                    f"{size:>14} {quant_type:>5} {nested!s:>6} {found['dtype']:>9} {rate:>10} {ours:>19} {theirs:>19}"
                )
                (OUT / "dequantize_4bit.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
