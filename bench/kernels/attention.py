"""Attention kernel against compiled flex_attention and dense eager maths, on one GPU.

    OUT=/some/folder python bench/kernels/attention.py          from the repository root, with rewriter importable

Numbers are checked first (float64 on a slice of the batch), then forward and forward+backward are timed.
TFLOP/s count the causal half: 4 * B * H * T^2 * D / 2 forward, 2.5 times that backward.
"""

import json
import os
import statistics
import sys
import traceback
from pathlib import Path

import torch

sys.path.insert(0, os.getcwd())
try:
    from rewriter.kernels.attention import attention
except ImportError:  # the repository without an installation: kernels/ is rewriter.kernels
    import types

    for name, folder in (("rewriter", "rewriter"), ("rewriter.kernels", "kernels")):
        module = types.ModuleType(name)
        module.__path__ = [str(Path(folder).resolve())]
        sys.modules[name] = module
    from rewriter.kernels.attention import attention

B, H, G, T, D = 4, 12, 2, 2048, 128
DEVICE, DTYPE = "cuda", torch.bfloat16
OUT = Path(os.environ.get("OUT", "."))
CONFIGS = {
    "softcap 50": dict(softcap=50.0, sink=False),
    "sink": dict(softcap=None, sink=True),
    "softcap 50, sink": dict(softcap=50.0, sink=True),
    "plain": dict(softcap=None, sink=False),
}


def inputs(batch=B, length=T, sink=False, dtype=DTYPE):
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(batch, length, n, D) for n in (H, G, G)]
    q, k, v = (torch.randn(s, device=DEVICE, dtype=dtype, generator=generator).transpose(1, 2) for s in shapes)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    if sink:
        tensors.append(torch.randn(H, device=DEVICE, dtype=dtype, generator=generator).requires_grad_())
    return tensors


def ours(softcap):
    def run(q, k, v, sink=None):
        return attention(q, k, v, sink=sink, softcap=softcap, is_causal=True)

    return run


def dense(softcap):
    def run(q, k, v, sink=None):
        k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
        s = q @ k.mT * D**-0.5
        s = softcap * torch.tanh(s / softcap) if softcap else s
        mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(mask, -torch.inf)
        if sink is not None:
            s = torch.cat((s, sink[:, None, None].expand(*s.shape[:3], 1)), -1)
        p = s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32))[..., : k.shape[2]]
        return p.to(v.dtype) @ v

    return run


def flex(softcap, length=T):
    """flex_attention compiled; a sink is applied with its log-sum-exp, as transformers does."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=DEVICE)

    def score(s, b, h, i, j):
        return softcap * torch.tanh(s / softcap)

    def run(q, k, v, sink=None):
        options = dict(score_mod=score if softcap else None, block_mask=block_mask, enable_gqa=True)
        if sink is None:
            return flex_attention(q, k, v, **options)
        out, lse = flex_attention(q, k, v, return_lse=True, **options)
        share = torch.sigmoid(lse - sink.float()[None, :, None])
        return (out * share.unsqueeze(-1)).to(out.dtype)

    torch._dynamo.reset()
    return torch.compile(run, dynamic=False)


def sdpa(softcap):
    def run(q, k, v, sink=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def errors(function, config):
    """Relative errors of output and gradients against float64, and of dense maths beside them."""
    tensors = inputs(batch=1, sink=config["sink"])
    exact = [t.detach().double().requires_grad_() for t in tensors]
    upstream = torch.randn(1, H, T, D, device=DEVICE, dtype=DTYPE, generator=torch.Generator(DEVICE).manual_seed(1))
    results = []
    for f, leaves in ((function, tensors), (dense(config["softcap"]), tensors), (dense(config["softcap"]), exact)):
        out = f(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))])
    new, old, truth = results
    names = ("out", "dq", "dk", "dv", "dsink")
    relative = {}
    for name, a, b, t in zip(names, new, old, truth, strict=False):
        norm = t.norm()
        relative[name] = [((x.double() - t).norm() / norm).item() for x in (a, b)]
    good = all(a <= 2 * b + 1e-3 for a, b in relative.values())
    return {"good": good, "relative [this, dense]": relative}


def milliseconds(function, repeat=20):
    for _ in range(5):
        function()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        FLUSH.zero_()  # nothing is left in L2 from the run before
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak(function):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(function, config):
    tensors = inputs(sink=config["sink"])
    upstream = torch.randn(B, H, T, D, device=DEVICE, dtype=DTYPE)

    def forward():
        with torch.no_grad():
            return function(*tensors)

    def both():
        return torch.autograd.grad(function(*tensors), tensors, upstream)

    flops = 4 * B * H * T * T * D / 2
    result = {"forward_ms": milliseconds(forward), "both_ms": milliseconds(both)}
    result["backward_ms"] = result["both_ms"] - result["forward_ms"]
    result["forward_tflops"] = flops / result["forward_ms"] / 1e9
    result["backward_tflops"] = 2.5 * flops / result["backward_ms"] / 1e9
    result["both_tflops"] = 3.5 * flops / result["both_ms"] / 1e9
    result["peak_mib"] = peak(both)
    return result


def kernels(config):
    """Milliseconds of each of our kernels in one forward and backward."""
    from torch.profiler import ProfilerActivity, profile

    function, tensors = ours(config["softcap"]), inputs(sink=config["sink"])
    function(*tensors).sum().backward()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(5):
            function(*tensors).sum().backward()
        torch.cuda.synchronize()
    return {
        e.key: e.device_time_total / e.count / 1e3
        for e in sorted(trace.key_averages(), key=lambda e: -e.device_time_total)[:8]
    }


def main():
    import triton

    global FLUSH
    FLUSH = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    results = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "shape": dict(B=B, H=H, G=G, T=T, D=D, dtype=str(DTYPE), causal=True), "configs": {},
    }  # fmt: skip
    print(results["device"], results["torch"], results["triton"])
    for name, config in CONFIGS.items():
        entry = results["configs"].setdefault(name, {})
        builders = {"this": ours, "flex": flex, "dense": dense}
        if not config["softcap"] and not config["sink"]:
            builders["sdpa"] = sdpa
        for label, builder in builders.items():
            try:
                function = builder(config["softcap"])
                found = {"numbers": errors(function, config) if label != "dense" else None}
                found.update(measure(function, config))
                if label == "this":
                    try:
                        found["kernels_ms"] = kernels(config)
                    except Exception as error:
                        found["kernels_ms"] = repr(error)
                entry[label] = found
                print(
                    f"{name:18s} {label:6s} fwd {found['forward_ms']:.3f} ms {found['forward_tflops']:.0f} TFLOP/s"
                    f"  bwd {found['backward_ms']:.3f} ms {found['backward_tflops']:.0f} TFLOP/s"
                    f"  both {found['both_ms']:.3f} ms {found['both_tflops']:.0f} TFLOP/s"
                    f"  peak {found['peak_mib']:.0f} MiB  {found['numbers']}", flush=True,
                )  # fmt: skip
            except Exception as error:
                entry[label] = {"error": f"{type(error).__name__}: {error}"[:2000]}
                print(f"{name:18s} {label:6s} FAILED", flush=True)
                traceback.print_exc()
            torch.cuda.empty_cache()
            (OUT / "attention.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
