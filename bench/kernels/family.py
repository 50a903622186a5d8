"""One family of memory-bound kernels against eager, Inductor and Liger: what its script runs, prints and judges.

A script yields cases; each is checked against float64 first, then timed: forward, and backward by itself behind a
forward that is not timed. All candidates and copies of as many bytes take turns, in one process, with a cold L2 cache.
Each candidate has inputs and upstream gradients of its own, as some of Liger's kernels write over theirs.

    ours, ours, compiled        the public function by itself, and as Inductor compiles it
    eager, torch.compile        the models' operators, and as Inductor compiles them (sizes are constants in both)
    liger                       Liger's function of the same meaning, if it is installed

Bytes are what must be moved once. Extra memory is the peak of both directions beyond inputs, results and gradients
(negative where a result is written over an input).
"""

import argparse
import dataclasses
import functools
import importlib
import os
import time
import traceback
from collections.abc import Callable

import measure
import torch
import verdict


@dataclasses.dataclass(frozen=True)
class Count:
    """Bytes of one part: "forward", "backward" or "both"; target: the share of the copy's bandwidth that is wanted."""

    part: str
    bytes: int
    target: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    variant: str
    make: Callable  # seed -> inputs; those that require a gradient get one
    functions: dict  # name -> function of the inputs, or None if there is none; "eager" is the meaning of all
    counts: dict  # label -> Count
    core: bool = True  # measured at every shape; else only at the family's first, or with --only
    compared: tuple = ("forward", "backward")  # parts that must not be slower than a peer's


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a script makes its cases for. shape: whole numbers, as in --shapes."""

    machine: measure.Machine
    shape: tuple
    tokens: int
    dtype: torch.dtype

    def tensor(self, *shape, seed=0, scale=1.0, mean=0.0, grad=True):
        made = torch.randn(*shape, device=self.machine.device, generator=self.machine.generator(seed))
        return made.mul_(scale).add_(mean).to(self.dtype).requires_grad_(grad)

    def size(self, *shape):
        """Bytes of a tensor."""
        return functools.reduce(int.__mul__, shape, 1) * self.dtype.itemsize

    def liger(self, module, name):
        """An autograd.Function of Liger's, or None."""
        if not self.machine.gpu and os.environ.get("TRITON_INTERPRET") != "1":
            return None
        try:
            return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
        except ImportError:
            return None


def each_way(forward, backward):
    """Counts of a family whose directions are judged by themselves."""
    return {"forward": Count("forward", forward, 0.9), "backward": Count("backward", backward, 0.85)}


def outputs_of(result):
    return result if isinstance(result, tuple) else (result,)


def gradients_of(outputs, inputs, upstream):
    wanted = [t for t in inputs if t.requires_grad]
    return torch.autograd.grad(outputs, wanted, upstream) if wanted else ()


def run(function, inputs, upstream):
    """(outputs, gradients); the upstream gradients stay as they are."""
    outputs = outputs_of(function(*inputs))
    grads = gradients_of(outputs, inputs, [u.to(o.dtype, copy=True) for u, o in zip(upstream, outputs, strict=True)])
    return [t.detach() for t in outputs], list(grads)


def exact(inputs):
    return [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs]


def upstream_of(outputs, machine):
    """Upstream gradients: 1 for a loss."""
    generator = machine.generator(1)
    return [torch.empty_like(o).normal_(generator=generator) if o.dim() else torch.ones_like(o) for o in outputs]


def candidates(case, machine, with_compiled):
    functions = {name: function for name, function in case.functions.items() if function}
    if with_compiled:
        torch._dynamo.reset()
        # A CPU's smoke run takes the same way, without waiting for a C++ compiler.
        options = dict(dynamic=False, backend="inductor" if machine.gpu else "aot_eager")
        for name, source in (("ours, compiled", "ours"), ("torch.compile", "eager")):
            functions[name] = torch.compile(functions[source], **options)
    order = (*verdict.OURS, "eager", *verdict.PEERS)
    return {name: functions[name] for name in order if name in functions}


def check(case, functions, machine, dtype):
    """(rows of all candidates with their errors, those functions that ran)."""
    inputs = case.make(0)
    with torch.no_grad():
        upstream = upstream_of(outputs_of(case.functions["eager"](*inputs)), machine)
    truth = sum(run(case.functions["eager"], exact(inputs), upstream), [])
    old = sum(run(case.functions["eager"], inputs, upstream), [])
    rows, ran = {}, {}
    for name, function in functions.items():
        rows[name] = {"name": name}
        try:
            outputs, grads = run(function, case.make(0), upstream)
            errors = measure.relative_errors(outputs + grads, old, truth)
            needed = measure.nbytes(*outputs, *grads)
            rows[name] |= {"errors": errors, "good": measure.is_good(errors, dtype)}
            del outputs, grads
            rows[name]["extra_mib"] = extra_mib(function, case.make(0), upstream, machine, needed)
            ran[name] = function
        except Exception as error:
            rows[name]["error"] = f"{type(error).__name__}: {error}"[:500]
            traceback.print_exc()
    return rows, ran, upstream


def extra_mib(function, inputs, upstream, machine, needed):
    upstream = [u.clone() for u in upstream]

    def step():
        outputs = outputs_of(function(*inputs))
        return outputs, gradients_of(outputs, inputs, upstream)

    return machine.peak_mib(step, needed)


def milliseconds(case, functions, upstream, machine, repeat):
    """({name: {part: ms}}, {label: ms of a copy of as many bytes}); "both" is the sum of the parts."""
    given = {name: case.make(0) for name in functions}
    own = {name: [u.clone() for u in upstream] for name in functions}
    trained = any(t.requires_grad for inputs in given.values() for t in inputs)
    parts = ["forward", "backward"] if trained else ["forward"]
    times, copied = {name: {} for name in functions}, {}
    for part in parts:
        works, before = [], []
        for name, function in functions.items():
            forward = functools.partial(function, *given[name])
            if part == "forward":
                works.append(forward)
                before.append(None)
            else:
                works.append(lambda result, name=name: gradients_of(outputs_of(result), given[name], own[name]))
                before.append(forward)
        labels = [
            label for label, count in case.counts.items() if {"both": parts[-1]}.get(count.part, count.part) == part
        ]
        works += [machine.copy(case.counts[label].bytes) for label in labels]
        found = machine.milliseconds(*works, before=before + [None] * len(labels), repeat=repeat)
        for name, ms in zip(functions, found, strict=False):
            times[name][part] = ms
        copied |= zip(labels, found[len(functions) :], strict=True)
    for parts_of in times.values():
        parts_of["both"] = sum(parts_of.values())
    return times, copied


def measured(case, setting, arguments, with_compiled):
    """The rows of one case, one for each candidate."""
    machine, of = setting.machine, case.counts
    functions = candidates(case, machine, with_compiled)
    if arguments.names:
        functions = {name: f for name, f in functions.items() if name.replace(", ", "-") in arguments.names.split(",")}
    rows, ran, upstream = check(case, functions, machine, setting.dtype)
    machine.empty_cache()
    times, copied = milliseconds(case, ran, upstream, machine, arguments.repeat)
    for name, ms in times.items():
        rates = {label: count.bytes / ms[count.part] / 1e6 for label, count in of.items()}
        shares = {label: copied[label] / ms[count.part] for label, count in of.items()}
        rows[name] |= {"ms": ms, "GB/s": rates, "of_copy": shares}
    kind = {
        "variant": case.variant, "shape": setting.shape, "tokens": setting.tokens,
        "dtype": str(setting.dtype).removeprefix("torch."), "copy_ms": copied, "compared": case.compared,
        "bytes": {label: count.bytes for label, count in of.items()},
        "parts": {label: count.part for label, count in of.items()},
        "targets": {label: count.target for label, count in of.items() if count.target},
    }  # fmt: skip
    return [kind | row for row in rows.values()]


def parse(text, shapes, tokens):
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a smoke run with tiny shapes")
    parser.add_argument("--shapes", help=f"comma-separated, sizes of one joined by x; default {shapes}")
    parser.add_argument("--tokens", help=f"comma-separated; default {tokens}")
    parser.add_argument("--dtypes", default="bfloat16", help="comma-separated names of torch's dtypes")
    parser.add_argument("--only", help="comma-separated variants, at every shape; blanks are written as -")
    parser.add_argument("--names", help="comma-separated candidates, as ours,ours-compiled,eager,liger,torch.compile")
    parser.add_argument("--repeat", type=int, help="timed turns of each; default 20, on a CPU 2")
    parser.add_argument("--seconds", type=float, default=45, help="after so many nothing is compiled any more")
    return parser.parse_args()


def main(name, text, cases, *, shapes, tokens, tiny):
    """Run a family: cases(setting) -> list of Case. shapes, tokens: defaults, as text; tiny: both of them for a CPU."""
    arguments = parse(text, shapes, tokens)
    machine = measure.Machine(arguments.device)
    default_shapes, default_tokens = (shapes, tokens) if machine.gpu else tiny
    arguments.repeat = arguments.repeat or (20 if machine.gpu else 2)
    all_shapes = [tuple(map(int, s.split("x"))) for s in (arguments.shapes or default_shapes).split(",")]
    all_tokens = [int(n) for n in (arguments.tokens or default_tokens).split(",")]
    only = arguments.only and arguments.only.split(",")
    results = {**machine.environment("liger-kernel"), "family": name, "rows": [], "not_compiled": [], "misses": []}
    print(name, results["device"], results["versions"], flush=True)
    start = time.monotonic()
    settings = [
        Setting(machine, shape, count, getattr(torch, dtype))
        for dtype in arguments.dtypes.split(",") for count in all_tokens for shape in all_shapes
    ]  # fmt: skip
    for setting in settings:
        first = (setting.shape, setting.tokens) == (all_shapes[0], all_tokens[0])
        for case in cases(setting):
            if (case.variant.replace(", ", "-").replace(" ", "-") not in only) if only else not (case.core or first):
                continue
            with_compiled = time.monotonic() - start < arguments.seconds
            try:
                rows = measured(case, setting, arguments, with_compiled)
            except Exception as error:  # one that fails must not end the run
                traceback.print_exc()
                rows = [{"variant": case.variant, "shape": setting.shape, "tokens": setting.tokens, "name": "ours",
                         "dtype": str(setting.dtype).removeprefix("torch."), "error": repr(error)[:500]}]  # fmt: skip
            if not with_compiled:
                results["not_compiled"].append(verdict.title(rows[0]))
            results["rows"] += rows
            results["misses"] = verdict.misses(results["rows"], timed=machine.gpu)
            print(verdict.text(rows), flush=True)
            measure.save(results, name)
            machine.empty_cache()
    results["seconds"] = time.monotonic() - start
    measure.save(results, name)
    print(verdict.summary(results), flush=True)
