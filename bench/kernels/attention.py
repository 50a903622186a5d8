"""Attention kernel against compiled flex_attention and dense eager maths, on one GPU.

    OUT=/some/folder python bench/kernels/attention.py

Numbers are checked first (float64 on a slice of the batch), then forward and forward+backward are timed.
TFLOP/s count the causal half: 4 * B * H * T^2 * D / 2 forward, 2.5 times that backward.
"""

import argparse
import dataclasses
import traceback

import measure
import torch

from rewriter.kernels.attention import attention

DTYPE = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where, and B sequences, H heads, G key heads, T tokens, D features of a head."""

    machine: measure.Machine
    B: int = 4
    H: int = 12
    G: int = 2
    T: int = 2048
    D: int = 128


CONFIGS = {
    "softcap 50": dict(softcap=50.0, sink=False),
    "sink": dict(softcap=None, sink=True),
    "softcap 50, sink": dict(softcap=50.0, sink=True),
    "plain": dict(softcap=None, sink=False),
}


def inputs(on, batch, sink=False):
    generator = on.machine.generator()
    shapes = [(batch, on.T, n, on.D) for n in (on.H, on.G, on.G)]
    q, k, v = (torch.randn(s, device=on.machine.device, dtype=DTYPE, generator=generator) for s in shapes)
    tensors = [t.transpose(1, 2).requires_grad_() for t in (q, k, v)]
    if sink:
        tensors.append(torch.randn(on.H, device=on.machine.device, dtype=DTYPE, generator=generator).requires_grad_())
    return tensors


def ours(on, softcap):
    def run(q, k, v, sink=None):
        return attention(q, k, v, sink=sink, softcap=softcap, is_causal=True)

    return run


def dense(on, softcap):
    def run(q, k, v, sink=None):
        k, v = (x.repeat_interleave(on.H // on.G, 1) for x in (k, v))
        s = q @ k.mT * on.D**-0.5
        s = softcap * torch.tanh(s / softcap) if softcap else s
        mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(mask, -torch.inf)
        if sink is not None:
            s = torch.cat((s, sink[:, None, None].expand(*s.shape[:3], 1)), -1)
        p = s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32))[..., : k.shape[2]]
        return p.to(v.dtype) @ v

    return run


def flex(on, softcap):
    """flex_attention compiled; a sink is applied with its log-sum-exp, as transformers does."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, on.T, on.T, device=on.machine.device)

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


def sdpa(on, softcap):
    def run(q, k, v, sink=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def errors(on, function, config):
    """Relative errors of output and gradients against float64, and of dense maths beside them."""
    tensors = inputs(on, 1, config["sink"])
    exact = [t.detach().double().requires_grad_() for t in tensors]
    upstream = torch.randn(
        1, on.H, on.T, on.D, device=on.machine.device, dtype=DTYPE, generator=on.machine.generator(1)
    )
    eager, results = dense(on, config["softcap"]), []
    for f, leaves in ((function, tensors), (eager, tensors), (eager, exact)):
        out = f(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))])
    found = measure.relative_errors(*results)
    names = ("out", "dq", "dk", "dv", "dsink")[: len(found)]
    relative = dict(zip(names, found, strict=True))
    return {"good": measure.is_good(found, DTYPE), "relative [this, dense]": relative}


def measured(on, function, config):
    tensors = inputs(on, on.B, config["sink"])
    upstream = torch.randn(on.B, on.H, on.T, on.D, device=on.machine.device, dtype=DTYPE)

    def forward():
        with torch.no_grad():
            return function(*tensors)

    def both():
        return torch.autograd.grad(function(*tensors), tensors, upstream)

    flops = 4 * on.B * on.H * on.T * on.T * on.D / 2
    result = dict(zip(("forward_ms", "both_ms"), on.machine.milliseconds(forward, both, ahead=0), strict=True))
    result["backward_ms"] = result["both_ms"] - result["forward_ms"]
    result["forward_tflops"] = flops / result["forward_ms"] / 1e9
    result["backward_tflops"] = 2.5 * flops / result["backward_ms"] / 1e9
    result["both_tflops"] = 3.5 * flops / result["both_ms"] / 1e9
    result["peak_mib"] = on.machine.peak_mib(both)
    return result


def kernels(on, config):
    """Milliseconds of each of our kernels in one forward and backward."""
    from torch.profiler import ProfilerActivity, profile

    function, tensors = ours(on, config["softcap"]), inputs(on, on.B, config["sink"])
    function(*tensors).sum().backward()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(5):
            function(*tensors).sum().backward()
        on.machine.synchronise()
    return {
        e.key: e.device_time_total / e.count / 1e3
        for e in sorted(trace.key_averages(), key=lambda e: -e.device_time_total)[:8]
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a smoke run with tiny shapes")
    machine = measure.Machine(parser.parse_args().device)
    on = Setting(machine) if machine.gpu else Setting(machine, 1, 4, 2, 24, 16)
    shape = {name: getattr(on, name) for name in "BHGTD"}
    results = {
        **machine.environment(), "shape": {**shape, "dtype": str(DTYPE), "causal": True},
        "matmul_tflops": machine.matmul_tflops(8192 if machine.gpu else 64), "configs": {},
    }  # fmt: skip
    print(results["device"], results["versions"], f"matmul {results['matmul_tflops']:.0f} TFLOP/s")
    for name, config in CONFIGS.items():
        entry = results["configs"].setdefault(name, {})
        builders = {"this": ours, "flex": flex, "dense": dense} if machine.gpu else {"this": ours, "dense": dense}
        if not config["softcap"] and not config["sink"]:
            builders["sdpa"] = sdpa
        for label, builder in builders.items():
            try:
                function = builder(on, config["softcap"])
                found = {"numbers": errors(on, function, config) if label != "dense" else None}
                found.update(measured(on, function, config))
                if label == "this" and machine.gpu:
                    try:
                        found["kernels_ms"] = kernels(on, config)
                    except Exception as error:
                        found["kernels_ms"] = repr(error)
                entry[label] = found
                print(
                    f"{name:18s} {label:6s} fwd {found['forward_ms']:.3f} ms {found['forward_tflops']:.0f} TFLOP/s"
                    f"  bwd {found['backward_ms']:.3f} ms {found['backward_tflops']:.0f} TFLOP/s"
                    f"  both {found['both_ms']:.3f} ms {found['both_tflops']:.0f} TFLOP/s"
                    f"  peak {found['peak_mib'] or 0:.0f} MiB  {found['numbers']}", flush=True,
                )  # fmt: skip
            except Exception as error:
                entry[label] = {"error": f"{type(error).__name__}: {error}"[:2000]}
                print(f"{name:18s} {label:6s} FAILED", flush=True)
                traceback.print_exc()
            machine.empty_cache()
            measure.save(results, "attention")


if __name__ == "__main__":
    main()
