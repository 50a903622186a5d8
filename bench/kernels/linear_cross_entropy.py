"""Linear head and cross entropy in one, against the matmuls it needs and against its peers, on one GPU.

    OUT=/some/folder python bench/kernels/linear_cross_entropy.py

Forward and backward together, head frozen and trained. Numbers are checked first: loss and gradients against float64 on
some of the tokens, beside eager's own error. The floor is the time of the plain matmuls that any of them needs, whole:
logits, dX and, where the head is trained, dW, made in turns with what is measured. Peers run if they are installed.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, os.getcwd())
from rewriter.kernels.linear_cross_entropy import linear_cross_entropy

SHAPES = ((8192, 1536, 151936), (8192, 4096, 128256))
DEVICE, DTYPE = "cuda", torch.bfloat16
OUT = Path(os.environ.get("OUT", "."))


def case(tokens, width, classes, trained, ignored=0.0, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(tokens, width, device=DEVICE, generator=generator).to(DTYPE).requires_grad_()
    weight = (torch.randn(classes, width, device=DEVICE, generator=generator) / width**0.5).to(DTYPE)
    target = torch.randint(0, classes, (tokens,), device=DEVICE, generator=generator)
    target[torch.rand(tokens, device=DEVICE, generator=generator) < ignored] = -100
    return x, weight.requires_grad_(trained), target


def eager(x, weight, target):
    return F.cross_entropy((x @ weight.t()).float(), target)


def ours(x, weight, target):
    return linear_cross_entropy(x, weight, target, out_dtype=torch.float32)


def peers():
    """name -> function of x, weight, target."""
    found = {"eager": eager, "torch.compile": torch.compile(eager)}
    if hasattr(F, "linear_cross_entropy"):
        found["torch F.linear_cross_entropy"] = lambda x, w, t: F.linear_cross_entropy(x, w, t)
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        found["liger"] = lambda x, w, t: Liger.apply(x, w, t)[0]
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut-cross-entropy"] = cut
    except ImportError:
        pass
    return found


def gradients(function, x, weight, target):
    loss = function(x, weight, target)
    wanted = [t for t in (x, weight) if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def errors(function, shape, trained):
    """Relative errors (this, eager's) of loss and gradients for 4,096 tokens, against float64."""
    x, weight, target = case(4096, *shape[1:], trained, ignored=0.1)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight)]
    truth = gradients(lambda x, w, t: F.cross_entropy(x @ w.t(), t), *exact, target)
    found = [gradients(f, x, weight, target) for f in (function, eager)]
    return [[((g.double() - t).norm() / t.norm()).item() for g in pair] for *pair, t in zip(*found, truth, strict=True)]


def milliseconds(*functions, repeat=12):
    """Median of each; they take turns, so that all of them see the clocks of a GPU that is as warm.

    The host runs ahead, as in a training step, so that launches are not waited for.
    """
    for _ in range(3):
        for function in functions:
            function()
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in functions] for _ in range(repeat)]
    for turn in events:
        for function, (start, end) in zip(functions, turn, strict=True):
            start.record()
            function()
            end.record()
    torch.cuda.synchronize()
    times = [[start.elapsed_time(end) for start, end in turn] for turn in events]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def peak_mib(function, needed):
    """Peak beyond the inputs and the gradients that must be there in the end."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - needed) / 2**20


def matmuls(x, weight):
    """A function that makes the plain products and nothing else, each of them whole."""
    x, trained, weight = x.detach(), weight.requires_grad, weight.detach()
    logits = torch.empty(len(x), len(weight), device=DEVICE, dtype=DTYPE).normal_()
    made = torch.empty_like(logits)

    def products():
        torch.mm(x, weight.t(), out=made)
        torch.mm(logits, weight)
        if trained:
            torch.mm(logits.t(), x)

    return products


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    versions = {}
    for name in ("torch", "triton", "liger-kernel", "cut-cross-entropy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    results = {"device": torch.cuda.get_device_name(), "versions": versions, "dtype": str(DTYPE), "rows": []}
    print(results["device"], versions)
    for shape in SHAPES:
        for trained in (False, True):
            print(f"{shape} {'trained' if trained else 'frozen'}")
            for name, function in {"ours": ours, **peers()}.items():
                if arguments.only and name not in arguments.only.split(","):
                    continue
                row = {"shape": shape, "trained": trained, "name": name}
                try:
                    row["errors"] = errors(function, shape, trained)
                    torch.cuda.empty_cache()
                    for ignored in (0.0, 0.5):
                        given = case(*shape, trained, ignored)
                        work = functools.partial(gradients, function, *given)
                        ms, floor = milliseconds(work, matmuls(*given[:2]))
                        row.update({f"ms, {ignored:.0%} ignored": ms, f"matmuls ms, {ignored:.0%} ignored": floor})
                        torch.cuda.empty_cache()
                        needed = 2 * (given[0].numel() + trained * given[1].numel())
                        row[f"extra MiB, {ignored:.0%} ignored"] = peak_mib(work, needed)
                        del given, work
                        torch.cuda.empty_cache()
                    floor = row["matmuls ms, 0% ignored"]
                    ratio = row["of matmuls"] = row["ms, 0% ignored"] / floor
                    errors_text = ", ".join(f"{a:.1e} ({b:.1e})" for a, b in row["errors"])
                    print(
                        f"  {name:30s} {row['ms, 0% ignored']:8.2f} ms ({ratio:.3f}x of {floor:.2f})  half ignored "
                        f"{row['ms, 50% ignored']:8.2f} ms  extra {row['extra MiB, 0% ignored']:8.0f} MiB  "
                        f"errors (eager's) {errors_text}", flush=True,
                    )  # fmt: skip
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
                    print(f"  {name:30s} {row['error']}", flush=True)
                results["rows"].append(row)
                torch._dynamo.reset()
                torch.cuda.empty_cache()
                (OUT / "linear_cross_entropy.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
