"""Norms, rotary, gates and cross entropy against a copy of as many bytes, on one GPU.

    OUT=/some/folder python bench/kernels/rows.py [part of a name]

Bytes are what has to be read and written once; cross entropy reads its rows twice, as no cache holds them. The ceiling
is a copy of as many bytes, measured in the same run. Every time is the median of calls with the cache of the GPU
overwritten in between, while the host is ahead. Numbers are checked first, against float64, but for the largest inputs.
"""

import importlib.metadata
import json
import os
import statistics
import sys
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, os.getcwd())
from rewriter.kernels.cross_entropy import cross_entropy
from rewriter.kernels.glu import glu
from rewriter.kernels.layer_norm import layer_norm
from rewriter.kernels.rms_norm import add_rms_norm, rms_norm
from rewriter.kernels.rotary import rotary

HIDDEN = (1536, 2048, 4096, 8192)
DEVICE = "cuda"
OUT = Path(os.environ.get("OUT", "."))


def tensor(*shape):
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def heads(count, width):
    return tensor(4, 2048, count, width).transpose(1, 2)


def turn(x, cos, sin, interleaved):
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = torch.stack((-b, a), -1).flatten(-2) if interleaved else torch.cat((-b, a), -1)
    return x * cos + turned * sin


def cases():
    """name -> (function, the same in PyTorch, inputs, how many of them get a gradient, tensors moved each way).

    Tensors moved are counted in the bytes of the first input, or of all that get a gradient for rotary.
    """
    found = {}
    for tokens in (8192, 32768):
        for width in HIDDEN:
            w, b = tensor(width), tensor(width)
            x, r = (lambda n=tokens, k=width: tensor(n, k) for _ in range(2))
            size = f"{tokens} x {width}"
            found[f"rms_norm {size}"] = (
                lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [x, w], 2, (2, 3)
            )  # fmt: skip
            found[f"rms_norm, frozen weight, {size}"] = (
                lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [x, w], 1, (2, 3)
            )  # fmt: skip
            found[f"add_rms_norm {size}"] = (
                lambda x, r, w: add_rms_norm(x, r, w, 1e-6),
                lambda x, r, w: (F.rms_norm(x + r, w.shape, w, 1e-6), x + r), [x, r, w], 3, (4, 4),
            )  # fmt: skip
            found[f"layer_norm {size}"] = (
                lambda x, w, b: layer_norm(x, w, b, 1e-6), lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-6),
                [x, w, b], 3, (2, 3),
            )  # fmt: skip
    found["rms_norm of heads 4 x 12 x 2048 x 128"] = (
        lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        [lambda: heads(12, 128), tensor(128)], 2, (2, 3),
    )  # fmt: skip
    for q, k, width, turns in ((12, 2, 128, False), (32, 8, 128, False), (32, 8, 80, False), (12, 2, 128, True)):
        tables = [tensor(1, 1, 2048, width) for _ in range(2)]
        found[f"rotary 4 x ({q} + {k}) x 2048 x {width}{', interleaved' if turns else ''}"] = (
            lambda *t, turns=turns: rotary(*t, interleaved=turns),
            lambda q, k, cos, sin, turns=turns: (turn(q, cos, sin, turns), turn(k, cos, sin, turns)),
            [lambda q=q, n=width: heads(q, n), lambda k=k, n=width: heads(k, n), *tables], 2, (2, 2),
        )  # fmt: skip
    for width in (8960, 14336):
        gate = lambda n=width: tensor(8192, n)  # noqa: E731
        found[f"glu 8192 x {width}"] = (
            lambda g, u: glu(g, u, activation="silu"), lambda g, u: F.silu(g) * u, [gate, gate], 2, (3, 5)
        )  # fmt: skip
    for classes in (128256, 151936):
        found[f"cross_entropy 4096 x {classes}"] = (
            cross_entropy, F.cross_entropy, [lambda n=classes: tensor(4096, n), torch.arange(4096, device=DEVICE)],
            1, (3, None),
        )  # fmt: skip
    return found


def milliseconds(function, flush, repeat=20):
    for _ in range(3):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    for start, end in events:
        torch.cuda._sleep(2_000_000)  # cycles: until then the host has launched what follows
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def tuples(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(function, reference, inputs, wanted):
    """The rule of the tests, |new - truth| <= 2 |old - truth| + 1e-3 |truth|, for outputs and gradients."""

    def run(f, dtype):
        leaves = [t.detach().to(dtype) if t.is_floating_point() else t for t in inputs]
        leaves = [t.requires_grad_(i < wanted) for i, t in enumerate(leaves)]
        outs = tuples(f(*leaves))
        dys = [torch.linspace(-1, 1, o.numel(), device=DEVICE).view(o.shape).to(torch.bfloat16).to(dtype) for o in outs]
        return [*outs, *torch.autograd.grad(outs, leaves[:wanted], dys)]

    results = (run(function, torch.bfloat16), run(reference, torch.bfloat16), run(reference, torch.float64))
    for new, old, truth in zip(*results, strict=True):
        error, allowed = ((t.double() - truth).norm() for t in (new, old))
        assert error <= 2 * allowed + 1e-3 * truth.norm(), f"error {error:.3e}, eager's {allowed:.3e}"


def measure(function, reference, inputs, wanted, moved, flush):
    inputs = [t() if callable(t) else t for t in inputs]
    head = inputs[0]
    if head.numel() <= 8192 * 8192:
        check(function, reference, inputs, wanted)
    leaves = [t.detach().requires_grad_(i < wanted) for i, t in enumerate(inputs)]
    size = 2 * (head.numel() + (inputs[1].numel() if head.dim() == 4 and inputs[1].dim() == 4 else 0))
    found = {}
    outs = tuples(function(*leaves))
    dys = [torch.randn_like(o) for o in outs]
    runs = {
        "forward": lambda: function(*leaves),
        "backward": lambda: torch.autograd.grad(outs, leaves[:wanted], dys, retain_graph=True),
    }
    for (name, run), times in zip(runs.items(), moved, strict=True):
        if times is None:
            continue
        source = torch.empty(size * times // 2, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        copy, ours = milliseconds(lambda s=source, t=target: t.copy_(s), flush), milliseconds(run, flush)
        found[name] = {"bytes": size * times, "ms": ours, "copy ms": copy, "of a copy": copy / ours}
        del source, target
    return found


def main():
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    results = {"device": torch.cuda.get_device_name(), "versions": versions, "rows": {}}
    print(results["device"], versions, flush=True)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    lines = []
    for name, case in cases().items():
        if part not in name:
            continue
        try:
            found = measure(*case, flush)
        except Exception:
            traceback.print_exc()
            found = {}
        torch.cuda.empty_cache()
        results["rows"][name] = found
        figures = [f"{way} {v['ms'] * 1e3:8.1f} us {v['of a copy']:6.1%}" for way, v in found.items()]
        lines.append(f"{name:>46}  {'   '.join(figures) or 'FAILED'}")
        print(lines[-1], flush=True)
        (OUT / "rows.json").write_text(json.dumps(results, indent=1))
    print("\n".join(["", "of a copy of as many bytes:", *lines]), flush=True)


if __name__ == "__main__":
    main()
