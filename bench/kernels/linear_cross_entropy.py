"""Linear head and cross entropy in one, against the matmuls it needs and against its peers, on one GPU.

    OUT=/some/folder python bench/kernels/linear_cross_entropy.py

Forward and backward together, head frozen and trained. Numbers are checked first: loss and gradients against float64 on
some of the tokens, beside eager's own error. The floor is the time of the plain matmuls that any of them needs, whole:
logits, dX and, where the head is trained, dW, made in turns with what is measured. Peers run if they are installed.
"""

import argparse
import functools

import measure
import torch
import torch.nn.functional as F

from rewriter.kernels.linear_cross_entropy import linear_cross_entropy

SHAPES = ((8192, 1536, 151936), (8192, 4096, 128256))
TINY = ((24, 32, 97),)
DTYPE = torch.bfloat16


def case(machine, tokens, width, classes, trained, ignored=0.0):
    generator = machine.generator()
    x = torch.randn(tokens, width, device=machine.device, generator=generator).to(DTYPE).requires_grad_()
    weight = (torch.randn(classes, width, device=machine.device, generator=generator) / width**0.5).to(DTYPE)
    target = torch.randint(0, classes, (tokens,), device=machine.device, generator=generator)
    target[torch.rand(tokens, device=machine.device, generator=generator) < ignored] = -100
    return x, weight.requires_grad_(trained), target


def eager(x, weight, target):
    return F.cross_entropy((x @ weight.t()).float(), target)


def ours(x, weight, target):
    return linear_cross_entropy(x, weight, target, out_dtype=torch.float32)


def peers(machine):
    """name -> function of x, weight, target."""
    found = {"eager": eager, "torch.compile": torch.compile(eager, backend="inductor" if machine.gpu else "aot_eager")}
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


def errors(machine, function, shape, trained):
    """Relative errors (this, eager's) of loss and gradients for 4,096 tokens, against float64."""
    x, weight, target = case(machine, min(4096, shape[0]), *shape[1:], trained, ignored=0.1)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight)]
    truth = gradients(lambda x, w, t: F.cross_entropy(x @ w.t(), t), *exact, target)
    return measure.relative_errors(*(gradients(f, x, weight, target) for f in (function, eager)), truth)


def matmuls(x, weight):
    """A function that makes the plain products and nothing else, each of them whole."""
    x, trained, weight = x.detach(), weight.requires_grad, weight.detach()
    logits = torch.empty(len(x), len(weight), device=x.device, dtype=DTYPE).normal_()
    made = torch.empty_like(logits)

    def products():
        torch.mm(x, weight.t(), out=made)
        torch.mm(logits, weight)
        if trained:
            torch.mm(logits.t(), x)

    return products


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="comma-separated names of what is measured")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a smoke run with a tiny shape")
    arguments = parser.parse_args()
    machine = measure.Machine(arguments.device)
    results = {**machine.environment("liger-kernel", "cut-cross-entropy"), "dtype": str(DTYPE), "rows": []}
    print(results["device"], results["versions"])
    for shape in SHAPES if machine.gpu else TINY:
        for trained in (False, True):
            print(f"{shape} {'trained' if trained else 'frozen'}")
            for name, function in {"ours": ours, **peers(machine)}.items():
                if arguments.only and name not in arguments.only.split(","):
                    continue
                row = {"shape": shape, "trained": trained, "name": name}
                try:
                    row["errors"] = errors(machine, function, shape, trained)
                    machine.empty_cache()
                    for ignored in (0.0, 0.5):
                        given = case(machine, *shape, trained, ignored)
                        work = functools.partial(gradients, function, *given)
                        ms, floor = machine.milliseconds(work, matmuls(*given[:2]), repeat=12, cold=False, ahead=0)
                        row.update({f"ms, {ignored:.0%} ignored": ms, f"matmuls ms, {ignored:.0%} ignored": floor})
                        machine.empty_cache()
                        needed = 2 * (given[0].numel() + trained * given[1].numel())
                        row[f"extra MiB, {ignored:.0%} ignored"] = machine.peak_mib(work, needed)
                        del given, work
                        machine.empty_cache()
                    floor = row["matmuls ms, 0% ignored"]
                    ratio = row["of matmuls"] = row["ms, 0% ignored"] / floor
                    errors_text = ", ".join(f"{a:.1e} ({b:.1e})" for a, b in row["errors"])
                    print(
                        f"  {name:30s} {row['ms, 0% ignored']:8.2f} ms ({ratio:.3f}x of {floor:.2f})  half ignored "
                        f"{row['ms, 50% ignored']:8.2f} ms  extra {row['extra MiB, 0% ignored'] or 0:8.0f} MiB  "
                        f"errors (eager's) {errors_text}", flush=True,
                    )  # fmt: skip
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
                    print(f"  {name:30s} {row['error']}", flush=True)
                results["rows"].append(row)
                torch._dynamo.reset()
                machine.empty_cache()
                measure.save(results, "linear_cross_entropy")


if __name__ == "__main__":
    main()
