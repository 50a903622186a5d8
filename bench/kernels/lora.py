"""Low-rank adapters beside the frozen matmuls they adapt, on one GPU.

    OUT=/some/folder python bench/kernels/lora.py

Forward, and backward (dX, dA, dB) by itself. Numbers are checked first, against float64 on some of the tokens, beside
eager's own error. The floor is the time of the frozen layers' plain matmuls, made in turns with what is measured; the
host runs ahead behind a kernel that waits, so that times are the GPU's.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, os.getcwd())
from rewriter.kernels.lora import lora

# name: tokens, width, widths out
SHAPES = {
    "gate, up 1536": (8192, 1536, (8960, 8960)),
    "gate, up 2048": (8192, 2048, (8192, 8192)),
    "gate, up 4096": (4096, 4096, (14336, 14336)),
    "q, k, v 1536": (8192, 1536, (1536, 256, 256)),
    "q, k, v 4096": (4096, 4096, (4096, 1024, 1024)),
    "o 4096": (4096, 4096, (4096,)),
    "down 8960": (8192, 8960, (1536,)),
    "down 14336": (4096, 14336, (4096,)),
}
DEVICE, DTYPE, SCALE = "cuda", torch.bfloat16, 2.0
OUT = Path(os.environ.get("OUT", "."))


def case(tokens, width, outs, rank, seed=0):
    """x, weights, A and B, and upstream gradients."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def tensor(*shape, grad=False):
        made = torch.randn(*shape, device=DEVICE, generator=generator) / (shape[-1] ** 0.5 if len(shape) == 2 else 1)
        return made.to(DTYPE).requires_grad_(grad)

    x = torch.randn(tokens, width, device=DEVICE, generator=generator).to(DTYPE).requires_grad_()
    return (
        x,
        [tensor(n, width) for n in outs],
        [tensor(rank, width, grad=True) for _ in outs],
        [tensor(n, rank, grad=True) for n in outs],
        [torch.randn(tokens, n, device=DEVICE, generator=generator).to(DTYPE) for n in outs],
    )


def ours(x, weights, down, up):
    return lora(x, weights, [None] * len(weights), down, up, [SCALE] * len(weights))


def eager(x, weights, down, up):
    layers = zip(weights, down, up, strict=True)
    return [F.linear(x, w) + F.linear(F.linear(x, a), b) * SCALE for w, a, b in layers]


def in_place(x, weights, down, up):
    """The branch is added by a matmul into the layer's result."""
    layers = zip(weights, down, up, strict=True)
    return [F.linear(x, w).addmm_(F.linear(x, a), b.t(), alpha=SCALE) for w, a, b in layers]


def errors(function, shape, rank):
    """Relative errors [(this, eager's)] of outputs and gradients for 1,024 tokens, against float64."""
    x, weights, down, up, dys = case(1024, *shape[1:], rank)

    def results(function, dtype):
        cast = [
            [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in group] for group in ([x], weights, down, up)
        ]
        ys = function(cast[0][0], *cast[1:])
        return [*ys, *torch.autograd.grad(ys, cast[0] + cast[2] + cast[3], [d.to(dtype) for d in dys])]

    truth, new, old = results(eager, torch.float64), results(function, DTYPE), results(eager, DTYPE)
    return [
        [((g.double() - t).norm() / t.norm()).item() for g in pair] for *pair, t in zip(new, old, truth, strict=True)
    ]


def milliseconds(*functions, repeat=12, calls=5):
    """Median of each of the functions, which take turns at some calls in a row: clocks are those of steady work."""
    for _ in range(3):
        for function in functions:
            function()
    times = []
    for _ in range(repeat):
        for function in functions:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(10_000_000)  # cycles, some milliseconds: until then the host has launched all of it
            start.record()
            for _ in range(calls):
                function()
            end.record()
            times.append((start, end))
    torch.cuda.synchronize()
    elapsed = [start.elapsed_time(end) / calls for start, end in times]
    return [statistics.median(elapsed[i :: len(functions)]) for i in range(len(functions))]


def backward(function, x, weights, down, up, dys):
    ys, wanted = function(x, weights, down, up), [x, *down, *up]
    return lambda: torch.autograd.grad(ys, wanted, dys, retain_graph=True)


def measure(name, rank, functions):
    shape = SHAPES[name]
    made = case(*shape, rank)
    x, weights, down, up, dys = made
    plain = x.detach()
    forwards = [lambda: [F.linear(plain, w) for w in weights]]
    backwards = [lambda: [torch.mm(d, w) for d, w in zip(dys, weights, strict=True)]]
    for function in functions.values():
        forwards.append(lambda f=function: f(x, weights, down, up))
        backwards.append(backward(function, *made))
    rows = []
    for name_of, *times in zip(
        ["frozen matmuls", *functions], milliseconds(*forwards), milliseconds(*backwards), strict=True
    ):
        row = {
            "shape": name,
            "sizes": shape,
            "rank": rank,
            "name": name_of,
            "forward_ms": times[0],
            "backward_ms": times[1],
        }
        if rows:
            row["of_frozen"] = [t / rows[0][key] for t, key in zip(times, ("forward_ms", "backward_ms"), strict=True)]
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--shapes", default=",".join(SHAPES).replace(", ", "_"), help="names, comma-separated, _ for ', '"
    )
    parser.add_argument("--ranks", default="16,64")
    arguments = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    results = {"device": torch.cuda.get_device_name(), "versions": versions, "dtype": str(DTYPE), "rows": []}
    print(results["device"], versions)
    for name in arguments.shapes.split(","):
        name = name.replace("_", ", ")
        for rank in map(int, arguments.ranks.split(",")):
            torch._dynamo.reset()
            compiled = torch.compile(eager), torch.compile(ours)
            functions = {"ours, compiled": compiled[1], "ours": ours, "eager": eager, "in place": in_place,
                         "torch.compile": compiled[0]}  # fmt: skip
            found = errors(ours, SHAPES[name], rank)
            rows = measure(name, rank, functions)
            rows[1]["errors"] = found
            worst = max(a / b for a, b in found)
            print(f"{name}, rank {rank}: frozen {rows[0]['forward_ms']:.3f} + {rows[0]['backward_ms']:.3f} ms, "
                  f"error at most {worst:.2f} of eager's")  # fmt: skip
            for row in rows[1:]:
                forward, back = row["of_frozen"]
                print(f"    {row['name']:16s} forward {forward:5.3f}  backward {back:5.3f}", flush=True)
            results["rows"] += rows
            (OUT / "lora.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
