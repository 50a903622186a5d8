"""A head with a low-rank adapter and its loss, in chunks of tokens, against PyTorch and the plain head, on one GPU.

    OUT=/some/folder python bench/kernels/head_adapter.py

Forward and backward together; the head's weight is frozen, or in 4 bits. Numbers are checked first: loss and gradients
against float64 on some of the tokens, beside eager's own error. `plain` is the same head without its adapter.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, os.getcwd())
from linear_cross_entropy import gradients as of_plain
from linear_cross_entropy import milliseconds, ours, peak_mib

from rewriter.kernels.dequantize_4bit import Packed4bit, dequantize_4bit
from rewriter.kernels.linear_cross_entropy import linear_cross_entropy

SHAPES, RANK, SCALE = ((8192, 1536, 151936), (8192, 4096, 128256)), 16, 2.0
DEVICE, DTYPE = "cuda", torch.bfloat16
OUT = Path(os.environ.get("OUT", "."))


def case(tokens, width, classes, adapter, seed=0):
    """x, weight, A, B, target"""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape, scale=1.0, dtype=DTYPE):
        return (torch.randn(*shape, device=DEVICE, generator=generator) * scale).to(dtype)

    x, weight = normal(tokens, width).requires_grad_(), normal(classes, width, scale=width**-0.5)
    down = normal(RANK, width, scale=width**-0.5, dtype=adapter).requires_grad_()
    up = normal(classes, RANK, scale=0.1, dtype=adapter).requires_grad_()
    target = torch.randint(0, classes, (tokens,), device=DEVICE, generator=generator)
    target[torch.rand(tokens, device=DEVICE, generator=generator) < 0.1] = -100
    return x, weight, down, up, target


def packed(weight):
    """Some matrix in 4 bits of the shape of `weight`."""
    count = weight.numel()
    data = torch.randint(0, 256, (count // 2, 1), device=DEVICE, dtype=torch.uint8)
    absmax = torch.full((count // 64,), 1.7 / weight.shape[1] ** 0.5, device=DEVICE)
    return Packed4bit(data, absmax, None, None, None, tuple(weight.shape), 64, 256, "nf4", DTYPE)


def eager(x, weight, down, up, target):
    weight = dequantize_4bit(weight) if isinstance(weight, Packed4bit) else weight
    logits = F.linear(x, weight)
    logits = (logits + F.linear(F.linear(x.to(down.dtype), down), up) * SCALE).to(logits.dtype)
    return F.cross_entropy(logits.float(), target)


def fused(x, weight, down, up, target):
    u = F.linear(x.to(down.dtype), down) * SCALE
    return linear_cross_entropy(x, weight, target, u=u, up=up, out_dtype=torch.float32)


def gradients(function, x, weight, down, up, target):
    loss = function(x, weight, down, up, target)
    return [loss.detach(), *torch.autograd.grad(loss, (x, down, up))]


def errors(shape, adapter):
    """Relative errors (fused, eager's) of loss and gradients for 2,048 tokens, against float64."""
    x, weight, down, up, target = case(2048, *shape[1:], adapter)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, down, up)]
    truth = gradients(lambda x, w, a, b, t: F.cross_entropy(x @ w.t() + x @ a.t() @ b.t() * SCALE, t), *exact, target)
    found = [gradients(f, x, weight, down, up, target) for f in (fused, eager)]
    return [[((g.double() - t).norm() / t.norm()).item() for g in pair] for *pair, t in zip(*found, truth, strict=True)]


def main():
    results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rank": RANK, "rows": []}
    print(results["device"], flush=True)
    for shape in SHAPES:
        for adapter in (torch.bfloat16, torch.float32):
            for four_bits in (False, True):
                row = {"shape": shape, "adapter": str(adapter), "4 bits": four_bits}
                try:
                    if not four_bits:
                        row["errors"] = errors(shape, adapter)
                        torch.cuda.empty_cache()
                    x, weight, *rest = case(*shape, adapter)
                    given = (x, packed(weight) if four_bits else weight, *rest)
                    works = {
                        "fused": functools.partial(gradients, fused, *given),
                        "plain": functools.partial(of_plain, ours, x, weight, rest[-1]),
                        "eager": functools.partial(gradients, eager, *given),
                    }
                    times = milliseconds(*works.values())
                    row["ms"] = dict(zip(works, times, strict=True))
                    needed = 2 * x.numel() + sum(t.numel() * t.element_size() for t in rest[:2])
                    row["extra MiB"] = {n: peak_mib(works[n], needed) for n in ("fused", "eager")}
                    del given, works, x, weight, rest
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
                print({k: v for k, v in row.items() if k != "errors"}, flush=True)
                for pair in row.get("errors", []):
                    print("    error {:.1e}, eager {:.1e}".format(*pair), flush=True)
                results["rows"].append(row)
                torch.cuda.empty_cache()
                (OUT / "head_adapter.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
