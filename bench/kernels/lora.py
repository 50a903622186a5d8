"""Low-rank adapters beside the frozen matmuls they adapt, on one GPU.

    OUT=/some/folder python bench/kernels/lora.py

Forward, and backward (dX, dA, dB) by itself. Numbers are checked first, against float64 on some of the tokens, beside
eager's own error. The floor is the time of the frozen layers' plain matmuls, made in turns with what is measured; the
host runs ahead behind a kernel that waits, so that times are the GPU's.
"""

import argparse

import measure
import torch
import torch.nn.functional as F

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
TINY = {"tiny": (24, 32, (48, 16))}
DTYPE, SCALE = torch.bfloat16, 2.0


def case(machine, tokens, width, outs, rank):
    """x, weights, A and B, and upstream gradients."""
    generator = machine.generator()

    def tensor(*shape, grad=False):
        made = torch.randn(*shape, device=machine.device, generator=generator) / (
            shape[-1] ** 0.5 if len(shape) == 2 else 1
        )
        return made.to(DTYPE).requires_grad_(grad)

    x = torch.randn(tokens, width, device=machine.device, generator=generator).to(DTYPE).requires_grad_()
    return (
        x,
        [tensor(n, width) for n in outs],
        [tensor(rank, width, grad=True) for _ in outs],
        [tensor(n, rank, grad=True) for n in outs],
        [torch.randn(tokens, n, device=machine.device, generator=generator).to(DTYPE) for n in outs],
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


def errors(machine, function, shape, rank):
    """Relative errors [(this, eager's)] of outputs and gradients for 1,024 tokens, against float64."""
    x, weights, down, up, dys = case(machine, min(1024, shape[0]), *shape[1:], rank)

    def results(function, dtype):
        cast = [
            [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in group] for group in ([x], weights, down, up)
        ]
        ys = function(cast[0][0], *cast[1:])
        return [*ys, *torch.autograd.grad(ys, cast[0] + cast[2] + cast[3], [d.to(dtype) for d in dys])]

    return measure.relative_errors(results(function, DTYPE), results(eager, DTYPE), results(eager, torch.float64))


def backward(function, x, weights, down, up, dys):
    ys, wanted = function(x, weights, down, up), [x, *down, *up]
    return lambda: torch.autograd.grad(ys, wanted, dys, retain_graph=True)


def measured(machine, name, shape, rank, functions):
    made = case(machine, *shape, rank)
    x, weights, down, up, dys = made
    plain = x.detach()
    forwards = [lambda: [F.linear(plain, w) for w in weights]]
    backwards = [lambda: [torch.mm(d, w) for d, w in zip(dys, weights, strict=True)]]
    for function in functions.values():
        forwards.append(lambda f=function: f(x, weights, down, up))
        backwards.append(backward(function, *made))
    turns = dict(repeat=12, calls=5, cold=False, ahead=10_000_000)
    forward_ms, backward_ms = (machine.milliseconds(*works, **turns) for works in (forwards, backwards))
    rows = []
    for name_of, *times in zip(["frozen matmuls", *functions], forward_ms, backward_ms, strict=True):
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


def text(name, rank, rows):
    worst = max(a / b for a, b in rows[1]["errors"])
    frozen = "{forward_ms:.3f} + {backward_ms:.3f} ms".format(**rows[0])
    lines = [f"{name}, rank {rank}: frozen {frozen}, error at most {worst:.2f} of eager's"]
    for row in rows[1:]:
        lines.append("    {:16s} forward {:5.3f}  backward {:5.3f}".format(row["name"], *row["of_frozen"]))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", help="names, comma-separated, _ for ', '; default: all")
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a smoke run with a tiny shape")
    arguments = parser.parse_args()
    machine = measure.Machine(arguments.device)
    shapes = SHAPES if machine.gpu else TINY
    if arguments.shapes:
        shapes = {name: shapes[name] for name in (n.replace("_", ", ") for n in arguments.shapes.split(","))}
    results = {**machine.environment(), "dtype": str(DTYPE), "rows": []}
    print(results["device"], results["versions"])
    for name, shape in shapes.items():
        for rank in map(int, arguments.ranks.split(",")):
            torch._dynamo.reset()
            compiled = [torch.compile(f, backend="inductor" if machine.gpu else "aot_eager") for f in (eager, ours)]
            functions = {"ours, compiled": compiled[1], "ours": ours, "eager": eager, "in place": in_place,
                         "torch.compile": compiled[0]}  # fmt: skip
            try:
                found = errors(machine, ours, shape, rank)
                rows = measured(machine, name, shape, rank, functions)
                rows[1]["errors"] = found
                print(text(name, rank, rows), flush=True)
            except Exception as error:  # one that fails must not end the run
                rows = [
                    {"shape": name, "sizes": shape, "rank": rank, "error": f"{type(error).__name__}: {error}"[:500]}
                ]
                print(rows, flush=True)
            results["rows"] += rows
            measure.save(results, "lora")


if __name__ == "__main__":
    main()
