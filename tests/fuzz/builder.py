"""Builds programs that are valid by construction: each step runs on small tensors as it is added.

A piece whose steps turn out not to fit (a trap may have changed a dtype) is taken back as a whole.
"""

import contextlib
from contextlib import nullcontext
from functools import cache

import torch
from fuzz.programs import CHECKPOINT, Leaf, Program, Step, Under, is_statement, jitter, last, text
from hypothesis import strategies as st
from torch.nn import functional as F

NAMES = {"torch": torch, "F": F, "jitter": jitter, "nullcontext": nullcontext}


class Unfit(Exception):
    """A step that PyTorch refuses."""


class Builder:
    """values: a sample tensor (or tuple) for every number so far; outputs: numbers the program gives back."""

    def __init__(self, draw, sizes, dtype, weight_dtype, frozen):
        self.draw, self.sizes, self.dtype, self.weight_dtype, self.frozen = draw, sizes, dtype, weight_dtype, frozen
        self.leaves, self.body, self.outputs, self.values = [], [], [], {}
        self.count = 0
        self.trap = None
        self._bodies = [self.body]

    # ---- choices; the first option is the simplest, which is what a failure shrinks to

    def choose(self, *options):
        return self.draw(st.sampled_from(options))

    def maybe(self, percent=50):
        return self.draw(st.integers(0, 99)) >= 100 - percent

    # ---- growing

    def leaf(self, kind, *shape, dtype=None, **options):
        if dtype is None:
            dtype = self.weight_dtype if kind != "input" else self.dtype
        if kind == "parameter":
            options.setdefault("grad", not (self.frozen and self.maybe(50)))
        leaf = Leaf(self._next(), kind, shape, dtype, **options)
        self.leaves.append(leaf)
        B, T = self.sizes
        sample = [{"B": B, "T": T}.get(s, s) for s in shape]
        if leaf.fill == "labels":
            self.values[leaf.out] = torch.zeros(sample, dtype=torch.int64)
        elif leaf.fill == "mask":
            self.values[leaf.out] = torch.ones(sample, dtype=torch.bool)
        else:
            self.values[leaf.out] = torch.full(sample, 0.5, dtype=getattr(torch, dtype))
        if leaf.layout == "expanded":
            self.values[leaf.out] = self.values[leaf.out][:1].expand(sample)
        return leaf.out

    def weight(self, *shape, **options):
        return self.leaf("buffer" if self.maybe(4) else "parameter", *shape, **options)

    def do(self, code, *args):
        """Add a step; gives back its number. A trap that waits for this step is sprung behind it."""
        out = self._step(code, *args)
        if self.trap is not None:
            out = self.trap.after(self, out)
        return out

    def _step(self, code, *args):
        names = {f"v{i}": self.values[i] for i in args}
        line = text(code, [f"v{i}" for i in args])
        try:
            with torch.no_grad():
                if is_statement(code):
                    exec(_compiled(line, "exec"), NAMES, names)
                    value = None
                else:
                    value = eval(_compiled(line, "eval"), NAMES, names)
        except Exception as error:
            raise Unfit(f"{line}: {error}") from None
        step = Step(self._next(), code, args)
        self._bodies[-1].append(step)
        self.values[step.out] = value
        return step.out

    plain = _step  # without traps

    @contextlib.contextmanager
    def under(self, context):
        """Steps inside run in a context; behind a checkpoint only the last value is known."""
        known = set(self.values)
        self._bodies.append([])
        ambient = eval(_compiled(context, "eval"), NAMES) if "autocast" in context else nullcontext()
        try:
            with ambient:
                yield
        finally:
            body = self._bodies.pop()
        if not body:
            return
        self._bodies[-1].append(Under(context, tuple(body)))
        if context == CHECKPOINT:
            hidden = set(self.values) - known - {leaf.out for leaf in self.leaves} - {last(body)}
            for number in hidden:
                del self.values[number]
            self.outputs[:] = [i for i in self.outputs if i not in hidden]

    @contextlib.contextmanager
    def attempt(self):
        """Take everything back if a step inside is unfit."""
        before = (len(self.leaves), len(self._bodies[-1]), len(self.outputs), dict(self.values), len(self._bodies))
        try:
            yield
        except Unfit:
            del self._bodies[before[4] :]
            del self.leaves[before[0] :], self._bodies[-1][before[1] :], self.outputs[before[2] :]
            self.values = before[3]

    def _next(self):
        self.count += 1
        return self.count - 1

    # ---- looking

    def shape(self, number):
        return tuple(self.values[number].shape)

    def dtype_of(self, number):
        return str(self.values[number].dtype).removeprefix("torch.")

    def tensors(self):
        """Numbers of the float tensors so far."""
        return [i for i, v in self.values.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]

    def is_weight(self, number):
        """Whether a value shares memory with a parameter."""
        place = self.values[number].untyped_storage().data_ptr()
        weights = [leaf.out for leaf in self.leaves if leaf.kind == "parameter"]
        return any(self.values[i].untyped_storage().data_ptr() == place for i in weights)

    def program(self, sizes, seed):
        return Program(tuple(self.leaves), tuple(self.body), tuple(dict.fromkeys(self.outputs)), sizes, seed)


@cache
def _compiled(line, kind):
    return compile(line, "<step>", kind)
