"""One program, optimised and eager: same values, gradients, layouts, side effects and random state.

Values by the float64 rule of tests/numerics.py. Where it fails, eager PyTorch is run a few times more with every
result moved by one unit of rounding: what those runs make of a sum or of a relu at zero, the optimised one may, too.
"""

import re
from dataclasses import dataclass, field

import torch
from fuzz.programs import (
    Model,
    arranged,
    base,
    casts_that_copy,
    forget_sources,
    is_statement,
    seed_jitter,
    source,
    steps,
)

import rewriter
from rewriter.sources import Changed

FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
JITTERED = 12


class Different(AssertionError):
    pass


@dataclass
class Outcome:
    """What one call did. error: what its forward or backward raised; values before it are there."""

    values: dict = field(default_factory=dict)
    layouts: dict = field(default_factory=dict)
    error: Exception | None = None
    where: str = ""


def check(program):
    """Raise Different unless the optimised program is like eager in every run.

    Gives back (report, what eager raised, how Dynamo alone is different). What torch.compile makes of a program without
    any rewriting (`y.data.mul_()` counts as a write there) is not the rewriter's doing, so such a program says nothing.
    """
    torch._dynamo.reset()
    forget_sources()
    new = rewriter.optimize(Model(program))
    try:
        raised = _compare(program, new)
    except Different as difference:
        torch._dynamo.reset()
        try:
            _compare(program, torch.compile(Model(program), backend="eager"))
        except Different as same:
            return rewriter.report(new), None, str(same)
        text = f"{difference}\n\n{source(program)}\n{program}\n\n{rewriter.report(new)}"
        raise Different(text) from difference.__cause__
    report = rewriter.report(new)
    broken = [f.reason for f in report.fallbacks if "left as it was" in f.reason]
    broken += [m.reason for m in report.near_misses if "the pattern raised" in m.reason]
    if broken:
        raise Different(f"{broken}\n\n{source(program)}\n{program}")
    return report, raised, None


def _compare(program, new):
    """Every run of a program by eager, in float64 and by `new`; gives back what eager raised."""
    # A cast to float64 of what is float64 already gives its operand back, which matters where either is written.
    copied = casts_that_copy(program, lambda model: call(model, program, 0)) if _written(program) else frozenset()
    eager, exact = Model(program), Model(program, "exact", copied)
    raised = None
    for run in range(len(program.sizes)):
        old, truth = call(eager, program, run), call(exact, program, run, exact=True)
        try:
            _same(call(new, program, run), old, truth, program, run)
        except Different as difference:
            raise Different(f"run {run}: {difference}") from difference.__cause__
        raised = raised or old.error
        if old.where == "forward":
            break
    return raised


def call(model, program, run, exact=False):
    """One forward and backward from equal random state, with gradients of the leaves behind every argument."""
    written = _written(program)
    leaves, given = {}, {}
    for leaf in program.leaves:
        if leaf.kind != "input":
            continue
        if leaf.layout.startswith("same "):
            given[leaf.out] = given[int(leaf.layout.split()[1])]
            continue
        tensor = base(leaf, program, run)
        tensor = tensor.double() if exact and tensor.is_floating_point() else tensor
        if leaf.grad and tensor.is_floating_point():
            leaves[f"gradient of v{leaf.out}"] = tensor.requires_grad_()
            if written:
                tensor = tensor * 1  # what autograd counts as a leaf can't be written in place
        rows = {"B": program.sizes[run][0], "T": program.sizes[run][1]}.get(leaf.shape[0] if leaf.shape else 0)
        given[leaf.out] = arranged(leaf, tensor, rows)
    model.zero_grad(set_to_none=True)
    outcome = Outcome()
    torch.manual_seed(program.seed + run)
    try:
        outcome.where = "forward"
        outputs = model(*given.values())
        outcome.values |= {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        outcome.layouts["random state"] = torch.get_rng_state().sum().item()
        plain = [o if type(o) is torch.Tensor else None for o in outputs]  # results on demand have no memory yet
        outcome.layouts |= {f"output {i}": _layout(o, [*given.values(), *plain]) for i, o in enumerate(outputs)}
        outcome.where = "backward"
        generator = torch.Generator().manual_seed(program.seed)
        upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
        live = [(o, u) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
        if live:
            torch.autograd.backward([o for o, _ in live], [u for _, u in live])
        outcome.where = ""
        outcome.values |= {name: leaf.grad for name, leaf in leaves.items()}
        outcome.values |= {f"gradient of {n}": p.grad for n, p in _plain(model).named_parameters()}
    except Exception as error:
        outcome.error = error
    outcome.values |= {f"v{out} afterwards": t.detach().clone() for out, t in given.items()}
    outcome.values |= {f"{n} afterwards": b.detach().clone() for n, b in _plain(model).state_dict().items()}
    return outcome


def _plain(model):
    return getattr(model, "_orig_mod", model)


def _written(program):
    """Whether anything is written in place."""
    codes = [s.code for s in steps(program.body)]
    return any(is_statement(c) or re.search(r"[a-z]_\(", c) or "inplace=True" in c for c in codes)


def _layout(output, others):
    """requires_grad, strides that matter, and which arguments and outputs it shares memory with."""
    if type(output) is not torch.Tensor:
        return (output.requires_grad,)
    strides = tuple(s for n, s in zip(output.shape, output.stride(), strict=True) if n > 1 and output.numel())
    place = output.untyped_storage().data_ptr()
    shared = tuple(
        i for i, t in enumerate(others) if t is not None and place and t.untyped_storage().data_ptr() == place
    )
    return output.requires_grad, strides, shared


def _same(new, old, truth, program, run):
    if old.error is not None:
        if old.where == "forward":
            return  # eager can't do this; the optimised one may, and it may do a backward that eager can't
        if isinstance(new.error, Changed):
            return  # what eager's backward finds changed in place, a result on demand finds when it is read
    elif new.error is not None:
        raise Different(f"{new.where} raised {type(new.error).__name__}: {new.error}") from new.error
    for what, was in old.layouts.items():
        got = new.layouts[what]
        if got[: len(got)] != was[: len(got)] if isinstance(was, tuple) else got != was:
            raise Different(f"{what}: {got}, eager has {was} (requires_grad, strides, shared memory)")
    family = []
    steepest = max(
        (t.double().norm() for n, t in truth.values.items() if n.startswith("gradient") and t is not None), default=0.0
    )
    narrow = {leaf.dtype for leaf in program.leaves} != {"float64"} or "32" in source(program)
    for what, was in old.values.items():
        got, true = new.values.get(what), truth.values.get(what)
        if (got is None) != (was is None):
            raise Different(f"{what} is {'missing' if got is None else 'there'} in the optimised run only")
        if was is None:
            continue
        if (got.shape, got.dtype) != (was.shape, was.dtype):
            raise Different(f"{what}: {got.dtype} {list(got.shape)}, eager has {was.dtype} {list(was.shape)}")
        floor = FLOOR[torch.float32] if narrow and was.dtype is torch.float64 else FLOOR.get(was.dtype, 0.0)
        least = floor * steepest if what.startswith("gradient") else 0.0  # some are zero but for rounding
        complaint = _unlike(got, [was], true, floor, least)
        if complaint:
            family = family or _jittered(program, run)
            complaint = _unlike(got, [was, *(o.values.get(what) for o in family)], true, floor, least)
        if complaint:
            raise Different(f"{what}: {complaint}\nnew {_numbers(got)}\nold {_numbers(was)}\ntruth {_numbers(true)}")


def _numbers(tensor):
    return None if tensor is None else tensor.flatten()[:12].tolist()


def _jittered(program, run):
    runs = []
    for number in range(JITTERED):
        seed_jitter(number)
        model = Model(program, "jitter")
        for earlier in range(run + 1):  # earlier runs may have written parameters and buffers
            outcome = call(model, program, earlier)
        runs.append(outcome)
    return runs


def _unlike(new, olds, truth, floor, least):
    """What is wrong with `new`, given ways that eager computes it; None if it is as good as they are."""
    olds = [o for o in olds if o is not None]
    if not new.is_floating_point():
        return None if any(torch.equal(new, o) for o in olds) else "other values"
    if truth is None:  # float64 raised where the others didn't
        truth = olds[0]
    overflown = sum(_odd(o) for o in olds).bool() & ~_odd(truth).bool()  # in float16, where better rounding needn't be
    if overflown.any():  # what NaN reaches from there depends on the order of steps: times 0, or masked
        overflown |= _odd(new).bool() & ~_odd(truth).bool()
    # The derivative of a root at 0 is infinite, and times 0 no number; a kernel that has none of it may know the limit.
    undefined = truth.isnan() & torch.stack([o.isnan() for o in olds]).all(0) & new.isfinite()
    there = ~(overflown | undefined)
    same = [o for o in olds if torch.equal(_odd(new)[there], _odd(o)[there])]
    if not same:
        return "NaN or infinity at other places"
    finite = torch.stack([torch.isfinite(t) for t in (new, truth, *same)]).all(0)
    new, truth = new.double()[finite], truth.double()[finite]
    error = (new - truth).norm()
    worst, norm = max((o.double()[finite] - truth).norm() for o in same), truth.norm()
    # A gradient that eager gets wrong by an eighth is what is left of a cancellation: its rounding says little.
    allowed = (2 if worst < norm / 8 else 16) * worst + max(floor * norm, least)
    return None if error <= allowed else f"error {error:.2e}, allowed {allowed:.2e}, norm {truth.norm():.2e}"


def _odd(tensor):
    """1 for NaN, 2 for inf, 3 for -inf, 0 for numbers."""
    return tensor.isnan() * 1 + tensor.isposinf() * 2 + tensor.isneginf() * 3
