"""What a pattern is: plain PyTorch references, a check, and the call that replaces a match.

    class SquaredRelu(Pattern):
        name = "squared_relu"
        references = (Reference(lambda x: torch.relu(x) ** 2, {"x": (4, 8)}),)

        def replacement(self, match):
            return Call(my_fused_op, (match["x"],))

A reference is traced with holes through the same canonical form as the model: its tensor arguments are the holes, its
float constants given under `consts` are holes for numbers. Casts and copies between its operators are seen through and
recorded on the match, so one reference covers every mix of dtypes; `check` says which of them the replacement serves.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter.canonical.table import TRANSPARENT
from rewriter.meta import TensorMeta, set_example
from rewriter.shadow import Shadow, Value, build_shadow


@dataclass(frozen=True, eq=False)
class Reference:
    """One spelling of a pattern.

    fn:      plain PyTorch function of tensors (positional) and constants (keyword) that returns one tensor, or a tuple
             whose first entry depends on all others
    inputs:  name -> example shape of a float32 tensor, or an example tensor (for integer inputs)
    consts:  names of the float constants that are holes; fn takes each as a keyword
    variant: data about this spelling, found again as `match.variant`
    extends: a smaller reference whose operators are all in this one: in a graph without them it need not be traced
    factors: those of `consts` that fn multiplies a tensor by, once each, and that are 1 where a model has none
    """

    fn: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: Mapping[str, Any]
    consts: tuple[str, ...] = ()
    variant: Mapping[str, Any] = field(default_factory=dict)
    extends: Reference | None = None
    factors: tuple[str, ...] = ()

    def possible(self, shadow: Shadow) -> bool:
        """Whether a graph has all the operators of this reference."""
        if self.extends is not None and not self.extends.possible(shadow):
            return False
        return all(shadow.by_op.get(v.op) for v in self.traced.needed)

    @cached_property
    def traced(self) -> TracedReference:
        return _trace(self)


@dataclass(frozen=True, eq=False)
class TracedReference:
    """The shadow of a reference: its root, its holes by value, and constant holes by their stand-in number.

    others:  what it returns besides the root
    factors: products with a number that may be missing -> (that number's name, the other factor)
    """

    shadow: Shadow
    root: Value
    others: tuple[Value, ...]
    holes: dict[Value, str]
    consts: dict[float, str]
    operators: tuple[Value, ...]
    factors: dict[Value, tuple[str, Value]]

    @cached_property
    def own(self) -> frozenset[Value]:
        """All values of it."""
        return frozenset(self.shadow.values)

    @cached_property
    def needed(self) -> tuple[Value, ...]:
        """The operators that a graph must have for a match."""
        return tuple(v for v in self.operators if v.op not in TRANSPARENT and v not in self.factors)


@dataclass(frozen=True, eq=False)
class Match:
    """A place in a graph where a reference was found.

    tensors:  hole name -> value it is bound to
    consts:   constant hole name -> number
    rounded:  hole name -> dtype that ambient autocast rounds this hole to before use
    bound:    value of the reference -> value of the graph
    passed:   (operator of the consumer, operator of the producer, what was seen through on that edge, last one first)
    root:     the graph value that the reference's result is; `output` is its real node
    inner:    hole name -> the match of what makes it, for holes that a pattern says are made in one of several ways:
              a match of its own, all of which is in this one, too, but for `passed`
    """

    pattern: Pattern
    reference: Reference
    tensors: dict[str, Value]
    consts: dict[str, float]
    rounded: dict[str, torch.dtype]
    bound: dict[Value, Value]
    passed: tuple[tuple[str, str, tuple[Value, ...]], ...]
    root: Value
    inner: Mapping[str, Match] = field(default_factory=dict)

    @property
    def variant(self) -> Mapping[str, Any]:
        return self.reference.variant

    @property
    def output(self) -> fx.Node:
        return self.root.node

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The real nodes that are replaced: `output`, then the reference's other results."""
        return (self.output, *(self.bound[value].node for value in self.reference.traced.others))

    def __getitem__(self, name: str) -> fx.Node:
        """The real node bound to a tensor hole."""
        return self.tensors[name].node

    def meta(self, name: str) -> TensorMeta:
        """Shape, dtype, device of the tensor bound to a hole."""
        return self.tensors[name].meta

    def attrs(self, op: str) -> tuple:
        """Canonical attributes of the matched operator `op` (the first of that name in the reference)."""
        return self.bound_operator(op).attrs

    def dtype(self, op: str) -> torch.dtype:
        """The dtype that the matched operator `op` yields."""
        return self.bound_operator(op).meta.dtype

    def bound_operator(self, op: str) -> Value:
        """The graph value that the first operator `op` of the reference was found as; KeyError if it has none."""
        for reference, value in self.bound.items():
            if reference.op == op:
                return value
        raise KeyError(f"no operator {op!r} in this match; it has {sorted({p.op for p in self.bound})}")

    def rounds(self, consumer: str, producer: str) -> bool:
        """Whether a narrowing cast stands between two matched operators."""
        return any(
            (c, p) == (consumer, producer) and any(is_narrowing(v) for v in values) for c, p, values in self.passed
        )


@dataclass(frozen=True)
class Call:
    """What replaces a match: `fn(*args, **kwargs)`; fx.Nodes among the arguments are the tensors of the match."""

    fn: Callable
    args: tuple
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    note: Mapping[str, Any] = field(default_factory=dict)


class Pattern:
    """Base of all patterns, built-in or plugin. Subclasses set `name`, `references` and `replacement`.

    rounded_inputs: the replacement accepts inputs that ambient autocast rounds first (see Match.rounded)
    row_operators:  slices and reshapes that keep the last dimension are seen through inside a match
    zeroing:        so are dropout, whose random numbers the replacement then draws, and `where` with 0
    lazy:           an intermediate result may leave the graph as an output that is computed on demand
    rows:           of a lazy one, the hole of whose rows each makes a row of such a result: parts can be read then
    within:         hole -> the ways to make what it stands for, of which one must be found there (see Match.inner)
    parts:          of a composite: the patterns that a match of it counts for as well
    attempts:       a match that fails halfway is a near miss
    lookalikes:     spellings that can't be replaced, but are near misses where `why_not` says so
    """

    name: str = ""
    references: tuple[Reference, ...] = ()
    lookalikes: tuple[Reference, ...] = ()
    attempts: bool = True
    rounded_inputs: bool = False
    row_operators: bool = False
    zeroing: bool = False
    lazy: bool = False
    rows: str = ""
    within: Mapping[str, tuple[Reference, ...]] = {}
    parts: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def check(self, match: Match) -> str | None:
        """A sentence that says why this match can't be replaced, or None."""
        return None

    def why_not(self, match: Match) -> str | None:
        """A sentence that says why this match of a lookalike stays, or None where it is something else altogether."""
        return None

    def already(self, match: Match) -> str | None:
        """What the model itself calls here, if nothing better is known: the place is reported and left as it is.

        On any device; see `library` for what is better on some.
        """
        return None

    def library(self, match: Match) -> str | None:
        """A library's operator that the model calls here for all of this match, if some devices have a better one.

        Where decisions.py has it that it stays, the place is reported and left as it is, unless the two are measured.
        """
        return None

    def row_input(self, match: Match) -> fx.Node | None:
        """Of a lazy pattern, the node of whose rows each makes a row of an intermediate result; None if there is none.

        By default what `rows` names.
        """
        return match[self.rows] if self.rows in match.tensors else None

    def rounds_once(self, match: Match) -> bool:
        """Whether every gradient comes by way of one rounding to the coarsest dtype of a match, as in the model.

        Numbers that happen to be equal share its error, which is then allowed, whatever the gradient's own dtype.
        """
        return False

    def replacement(self, *matches: Match) -> Call:
        """The call for one match, or for several that `group` put together (then it returns a tuple, in order)."""
        raise NotImplementedError(f"pattern {self.name!r} has no replacement")

    def group(self, matches: list[Match]) -> list[tuple[Match, ...]]:
        """Which matches become one call; by default each is alone. A group that can't be one falls apart again."""
        return [(m,) for m in matches]

    def cut(self, match: Match, longest: int) -> Mapping[int, int] | None:
        """Sizes to verify with instead of the matched ones (size -> size, for token dimensions longer than `longest`).

        None takes the default: the leading dimensions of the largest input are tokens, unless a width is as long.
        """
        return None

    def sample(
        self, match: Match, name: str, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator
    ) -> torch.Tensor | None:
        """A tensor of shape `shapes[name]`, on the generator's device, to verify with for the hole `name`.

        Where the replacement reads a node that is no hole, `name` is the node's. `shapes` has it and every hole; long
        dimensions were cut. None takes the default: normal numbers, for integers 0 and 1.
        """
        return None


def is_narrowing(value: Value) -> bool:
    """Whether a cast value loses bits."""
    if value.op != "cast" or value.inputs[0].meta is None:
        return False
    source, target = value.inputs[0].meta.dtype, value.attrs[0]
    return torch.promote_types(source, target) != target


@contextlib.contextmanager
def usual_settings() -> Iterator[None]:
    """Tensors on the CPU, gradients, no autocast: patterns are the same, whatever the program has set."""
    with torch.device("cpu"), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        yield


def _trace(reference: Reference) -> TracedReference:
    names = list(reference.inputs)
    inputs = reference.inputs.values()
    examples = [v if isinstance(v, torch.Tensor) else torch.ones(v, dtype=torch.float32, device="cpu") for v in inputs]
    stand_ins = {name: 0.3141 + 0.01732 * i for i, name in enumerate(reference.consts)}
    parameters = inspect.signature(reference.fn).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    unknown = [n for n in required if n not in names and n not in stand_ins]
    if unknown:
        raise ValueError(f"reference {reference.fn!r} has parameters {unknown} that are neither inputs nor consts")
    with usual_settings():
        gm = make_fx(lambda *t: reference.fn(*t, **stand_ins), tracing_mode="fake", pre_dispatch=True)(*examples)
    for node in gm.graph.nodes:
        set_example(node, node.meta.get("val"))
    shadow = build_shadow(gm.graph)
    results = gm.graph.find_nodes(op="output")[0].args[0]
    root, *others = [shadow.of[r] for r in (results if isinstance(results, tuple | list) else [results])]
    holes = dict(zip((shadow.of[n] for n in gm.graph.find_nodes(op="placeholder")), names, strict=True))
    operators, todo = [], [root]
    while todo:
        value = todo.pop()
        if value in operators or value.op in ("input", "const"):
            continue
        operators.append(value)
        todo.extend(value.inputs)
    consts = {v: k for k, v in stand_ins.items()}
    factors = {}
    for value in operators:
        for number, other in (value.inputs, value.inputs[::-1]) if value.op == "mul" else ():
            if number.op == "const" and consts.get(number.const) in reference.factors:
                factors[value] = consts[number.const], other
    return TracedReference(shadow, root, tuple(others), holes, consts, tuple(operators), factors)
