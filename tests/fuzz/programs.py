"""Random small graphs as data, and the module that runs one.

A program is a list of steps. A step is one line of PyTorch with places for its operands, so a program reads like the
model it stands for; `source` writes it out, and that is also what is compiled.
"""

import itertools
import linecache
import re
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHECKPOINT = "checkpoint"
_names = itertools.count()


@dataclass(frozen=True)
class Leaf:
    """A tensor that exists before the forward; its value has the number `out`.

    kind:   "input" (an argument), "parameter" or "buffer"
    shape:  sizes; "B" and "T" stand for the sizes of a run
    layout: "dense", "swapped" (last two dimensions), "turned" (first two), "every second", "offset", "expanded"
            (first dimension has stride 0), or "same N": the very tensor of leaf N
    fill:   "normal", "small", "labels" (below 11, some -100), "mask" (booleans), "scores" (0 or -inf, lower triangle)
    """

    out: int
    kind: str
    shape: tuple
    dtype: str = "float32"
    grad: bool = True
    layout: str = "dense"
    fill: str = "normal"


@dataclass(frozen=True)
class Step:
    """One line: `{}` or `{0}` are operands. An assignment (`{}[0] = 1`) has no result, so nobody reads its number."""

    out: int
    code: str
    args: tuple[int, ...]


@dataclass(frozen=True)
class Under:
    """Steps inside a context: the source of a `with`, or CHECKPOINT (then only the last step's result leaves)."""

    context: str
    body: tuple


@dataclass(frozen=True)
class Program:
    """sizes: B and T of each run; the seed makes the numbers."""

    leaves: tuple[Leaf, ...]
    body: tuple
    outputs: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...] = ((2, 4), (2, 7))
    seed: int = 0


def source(program, mode="plain", copied=frozenset()):
    """Python source of the forward.

    Modes: "exact" is float64, "jitter" passes each result through `jitter`, "watch" through `watch`. copied: steps
    whose result has memory of its own, also where a cast to float64 would give back its operand.
    """
    inputs = [f"v{leaf.out}" for leaf in program.leaves if leaf.kind == "input"]
    lines = [f"def forward({', '.join(['self', *inputs])}):"]
    lines += [f"    v{leaf.out} = self.v{leaf.out}" for leaf in program.leaves if leaf.kind != "input"]
    lines += _lines(program.body, "    ", mode, copied)
    lines.append(f"    return ({''.join(f'v{i}, ' for i in program.outputs)})")
    return "\n".join(lines) + "\n"


def _lines(body, indent, mode, copied):
    lines = []
    for step in body:
        if isinstance(step, Step):
            lines.append(indent + _line(step, mode, copied))
        elif step.context == CHECKPOINT:
            taken = [f"v{i}" for i in sorted(free(step.body))]
            result = f"v{last(step.body)}"
            lines.append(f"{indent}def inner({', '.join(taken)}):")
            lines += _lines(step.body, indent + "    ", mode, copied)
            lines.append(f"{indent}    return {result}")
            lines.append(f"{indent}{result} = checkpoint(inner, {', '.join(taken)}, use_reentrant=False)")
        else:
            skipped = mode == "exact" and "autocast" in step.context
            lines.append(f"{indent}with {'nullcontext()' if skipped else step.context}:")
            lines += _lines(step.body, indent + "    ", mode, copied) or [indent + "    pass"]
    return lines


def _line(step, mode, copied):
    code = text(step.code, [f"v{i}" for i in step.args])
    if mode == "exact":
        code = re.sub(r"torch\.(float32|bfloat16|float16)\b", "torch.float64", code).replace(".float()", ".double()")
    if is_statement(step.code):
        return code
    if mode == "jitter":
        return f"v{step.out} = jitter({code}, {', '.join(f'v{i}' for i in step.args)})"
    if mode == "watch":
        return f"v{step.out} = watch({step.out}, {code}, {', '.join(f'v{i}' for i in step.args)})"
    if step.out in copied:
        code = f"({code}).clone()"
    return f"v{step.out} = {code}"


def text(code, names):
    """A step's code with its operands' names."""
    return code.format(*names)


def is_statement(code):
    return re.search(r"\s[-+*/]?=\s", code) is not None


def steps(body):
    """All steps, those inside contexts included."""
    for step in body:
        if isinstance(step, Step):
            yield step
        else:
            yield from steps(step.body)


def last(body):
    return [s.out for s in steps(body) if not is_statement(s.code)][-1]


def free(body):
    """Values that steps read and don't make."""
    made = {s.out for s in steps(body)}
    return {i for s in steps(body) for i in s.args} - made


def compile_source(text):
    """The forward in a source text; tracebacks show its lines."""
    name = f"<program {next(_names)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    namespace = {
        "__name__": __name__,
        "torch": torch,
        "F": F,
        "checkpoint": checkpoint,
        "nullcontext": nullcontext,
        "jitter": jitter,
        "watch": watch,
    }
    exec(compile(text, name, "exec"), namespace)
    return namespace["forward"]


def forget_sources():
    for name in [n for n in linecache.cache if n.startswith("<program ")]:
        del linecache.cache[name]


class Model(nn.Module):
    """Runs a program; parameters and buffers are attributes named after their values."""

    def __init__(self, program, mode="plain", copied=frozenset()):
        super().__init__()
        for leaf in program.leaves:
            if leaf.kind == "input":
                continue
            tensor = arranged(leaf, base(leaf, program, 0))
            if mode == "exact" and tensor.is_floating_point():
                tensor = tensor.double()
            if leaf.kind == "parameter":
                setattr(self, f"v{leaf.out}", nn.Parameter(tensor, requires_grad=leaf.grad))
            else:
                self.register_buffer(f"v{leaf.out}", tensor)
        self.__class__ = type("Model", (Model,), {"forward": compile_source(source(program, mode, copied))})


def base(leaf, program, run):
    """The dense tensor behind a leaf in one run; `arranged` gives it its layout."""
    generator = torch.Generator().manual_seed(1000 * program.seed + 10 * leaf.out + run)
    B, T = program.sizes[run]
    shape = [{"B": B, "T": T}.get(s, s) for s in leaf.shape]
    if leaf.layout == "swapped":
        shape[-2:] = shape[:-3:-1]
    elif leaf.layout == "turned":
        shape[:2] = shape[1::-1]
    elif leaf.layout == "every second":
        shape[-1] *= 2
    elif leaf.layout == "offset":
        shape[-1] += 3
    elif leaf.layout == "expanded":
        shape[0] = 1
    if leaf.fill == "labels":
        labels = torch.randint(0, 11, shape, generator=generator)
        return labels.masked_fill(torch.rand(shape, generator=generator) < 0.2, -100)
    if leaf.fill == "mask":
        return (torch.rand(shape, generator=generator) < 0.7) | torch.eye(*shape[-2:], dtype=torch.bool)
    if leaf.fill == "scores":
        return torch.full(shape, float("-inf")).triu(1).to(getattr(torch, leaf.dtype))
    scale = {"normal": 1.0, "small": 0.3}[leaf.fill]
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(getattr(torch, leaf.dtype))


def arranged(leaf, tensor, rows=None):
    """A view of the base tensor in the leaf's layout; rows: the first size of an expanded one."""
    if leaf.layout == "swapped":
        return tensor.transpose(-1, -2)
    if leaf.layout == "turned":
        return tensor.transpose(0, 1)
    if leaf.layout == "every second":
        return tensor[..., ::2]
    if leaf.layout == "offset":
        return tensor[..., 1:-2]
    if leaf.layout == "expanded":
        return tensor.expand(rows if rows is not None else leaf.shape[0], *tensor.shape[1:])
    return tensor


_noise = torch.Generator()


def jitter(result, *operands):
    """A new float result moved by about one unit of rounding, and so its gradient; what shares memory stays."""
    if not isinstance(result, torch.Tensor) or not result.is_floating_point() or not result.numel():
        return result
    if shares_memory(result, operands):
        return result
    result = _moved(result)
    if result.requires_grad:
        result.register_hook(_moved)
    return result


def _moved(tensor):
    noise = torch.rand(tensor.shape, generator=_noise, dtype=torch.float64) * 2 - 1
    return (tensor.double() * (1 + torch.finfo(tensor.dtype).eps * noise)).to(tensor.dtype)


def seed_jitter(number):
    _noise.manual_seed(number)


def shares_memory(result, operands):
    places = {t.untyped_storage().data_ptr() for o in operands for t in (o if isinstance(o, tuple | list) else (o,))}
    return result.untyped_storage().data_ptr() in places


_watched = set()


def watch(number, result, *operands):
    if isinstance(result, torch.Tensor) and not shares_memory(result, operands):
        _watched.add(number)
    return result


def casts_that_copy(program, run):
    """Steps with a cast whose result has memory of its own; run: calls a model once."""
    _watched.clear()
    run(Model(program, "watch"))
    return frozenset(
        s.out for s in steps(program.body) if s.out in _watched and re.search(r"\.(to|float|type|type_as)\(", s.code)
    )
