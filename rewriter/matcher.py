"""Find references in a shadow: start at the rarest operator, climb to candidate roots, then match downwards.

The search is a goal list with an undo trail; commutative operators try both orders. A budget bounds each candidate.
The best failed attempt is kept as a near miss, with the condition that failed and the node it speaks of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rewriter.canonical import COMMUTATIVE, TRANSPARENT
from rewriter.pattern import Match, Pattern, Reference, TracedReference, is_narrowing
from rewriter.shadow import Shadow, Value, is_row_operator, zeroed_in_part

BUDGET = 4000  # goals tried for one candidate
# Operators whose attributes a pattern reads from the match instead of asking for its own.
FREE_ATTRS = {"cross_entropy", "token_loss", "attention", "reshape", "expand", "dequantize_4bit"}
MAX_ROOTS = 32  # candidates climbed to from one anchor


@dataclass(frozen=True)
class Miss:
    """An attempt that failed: how many operators of the reference had matched, why it stopped, and where."""

    pattern: Pattern
    anchor: Value
    progress: float
    reason: str
    at: Value


def find(shadow: Shadow, pattern: Pattern) -> tuple[list[Match], list[Miss]]:
    """All matches of a pattern's references, and for every anchor without a match its best failed attempt."""
    matches: list[Match] = []
    misses: dict[Value, Miss] = {}
    matched: set[Value] = set()
    for reference in pattern.references:
        found, missed = _find_reference(shadow, pattern, reference)
        matches += found
        for match in found:
            matched.update(match.bound.values())
        for miss in missed:
            if miss.anchor not in misses or miss.progress > misses[miss.anchor].progress:
                misses[miss.anchor] = miss
    if not pattern.attempts:
        return matches, []
    return matches, [m for m in misses.values() if m.anchor not in matched and m.at not in matched]


def find_lookalikes(shadow: Shadow, pattern: Pattern) -> Iterator[Match]:
    """The matches of what only looks like a pattern."""
    for reference in pattern.lookalikes:
        yield from _find_reference(shadow, pattern, reference)[0]


def _find_reference(shadow: Shadow, pattern: Pattern, reference: Reference) -> tuple[list[Match], list[Miss]]:
    if not reference.possible(shadow):
        return [], []
    traced = reference.traced
    counts = {op: len(shadow.by_op[op.op]) for op in traced.needed}
    if not counts:
        return [], []
    anchor = min(counts, key=lambda op: counts[op])
    path = _path_to_root(traced, anchor)
    matches, misses, tried = [], [], set()
    for start in list(shadow.by_op[anchor.op]):
        best: Miss | None = None
        found: Value | None = None
        for root in _climb(start, path, traced, pattern):
            if root in tried or (found is not None and not _is_variant(root, found)):
                continue
            tried.add(root)
            search = _Search(pattern, traced, shadow)
            if root.node is not None and search.solve(((traced.root, root, None),)):
                matches.append(search.match(reference, root))
                found = root
                continue
            if best is None or search.progress > best.progress:
                best = Miss(pattern, start, search.progress, search.reason, search.at or root)
        if best is not None and found is None and best.progress > 0.5 and not pattern.parts:
            misses.append(best)
    return matches, misses


def _is_variant(root: Value, other: Value) -> bool:
    """Whether two values differ only in what a pattern reads from them: a loss alone, and with its z-loss."""
    return root.op == other.op and root.op in FREE_ATTRS and root.inputs[:1] == other.inputs[:1]


def _path_to_root(traced: TracedReference, anchor: Value) -> list[Value]:
    inside = set(traced.operators)
    path, value = [], anchor
    while value is not traced.root:
        value = next(u for u in value.users if u in inside)
        path.append(value)
    return path


def _climb(start: Value, path: list[Value], traced: TracedReference, pattern: Pattern) -> Iterator[Value]:
    level = [start]
    for step in path:
        above: dict[Value, None] = {}
        todo = list(level)
        while todo and len(above) < MAX_ROOTS:
            for user in todo.pop().users:
                if user.op == step.op:
                    above[user] = None
                elif _passed(user, pattern) is not None:
                    todo.append(user)
        level = [*above, *(level if step in traced.factors else ())]
    yield from level


def _passed(value: Value, pattern: Pattern) -> Value | None:
    """The operand of what is seen through inside a match."""
    if value.op in TRANSPARENT or (pattern.row_operators and is_row_operator(value)):
        return value.inputs[0]
    return zeroed_in_part(value) if pattern.zeroing else None


class _Search:
    def __init__(self, pattern: Pattern, traced: TracedReference, shadow: Shadow):
        self.pattern, self.traced, self.shadow = pattern, traced, shadow
        self.inner: dict[str, Reference] = {}  # by the hole of the pattern's reference that it makes
        self.bound: dict[Value, Value] = {}
        self.consts: dict[str, float] = {}
        self.rounded: dict[str, object] = {}
        self.passed: list[tuple[Value | None, Value, tuple[Value, ...]]] = []
        self.steps = 0
        self.progress, self.reason, self.at = 0.0, "", None

    def match(self, reference: Reference, root: Value) -> Match:
        inner = {name: self._inner_match(r) for name, r in self.inner.items()}
        whole = self._match(reference, root, lambda consumer: not any(consumer in t.own for t in self._traced()[1:]))
        for match in inner.values():
            whole.tensors.update(match.tensors)
            whole.consts.update(match.consts)
            whole.rounded.update(match.rounded)
            whole.bound.update(match.bound)
        return replace(whole, inner=inner)

    def _inner_match(self, reference: Reference) -> Match:
        traced = reference.traced
        return self._match(reference, self.bound[traced.root], lambda consumer: consumer in traced.own)

    def _match(self, reference: Reference, root: Value, passed_by: Callable[[Value | None], bool]) -> Match:
        """What is bound of one reference, with what was seen through on the edges that `passed_by` says are its own."""
        traced = reference.traced
        tensors = {name: self.bound[hole] for hole, name in traced.holes.items() if hole in self.bound}
        operators = {p: g for p, g in self.bound.items() if p in traced.own and p not in traced.holes}
        consts = {name: number for name, number in self.consts.items() if name in reference.consts}
        rounded = {name: dtype for name, dtype in self.rounded.items() if name in reference.inputs}
        passed = tuple((c.op if c else "", p.op, seen) for c, p, seen in self.passed if passed_by(c))
        return Match(self.pattern, reference, tensors, consts, rounded, operators, passed, root)

    def _traced(self) -> tuple[TracedReference, ...]:
        return (self.traced, *(reference.traced for reference in self.inner.values()))

    def _of(self, want: Value) -> TracedReference:
        """The reference that a value belongs to."""
        return next(t for t in self._traced() if want in t.own) if self.inner else self.traced

    def solve(self, goals: tuple) -> bool:
        if not goals:
            return True
        self.steps += 1
        if self.steps > BUDGET:
            return self._fail("the search budget was used up", goals[0][1])
        (want, have, consumer), rest = goals[0], goals[1:]
        state = (dict(self.bound), dict(self.consts), dict(self.rounded), dict(self.inner), len(self.passed))
        for more in self._expand(want, have, consumer):
            if self.solve((*more, *rest)):
                return True
            self.bound, self.consts, self.rounded, self.inner = (dict(s) for s in state[:4])
            del self.passed[state[4] :]
        return False

    def _expand(self, want: Value, have: Value, consumer: Value | None) -> Iterator[tuple]:
        if want.op == "const":
            if self._bind_const(want, have):
                yield ()
        elif want in (traced := self._of(want)).holes:
            if traced is self.traced and traced.holes[want] in self.pattern.within:
                yield from self._ways(traced.holes[want], have, consumer)
            elif self._bind_hole(want, have):
                yield ()
        else:
            yield from self._operator(want, have, consumer)
            if want in traced.factors:
                name, factor = traced.factors[want]
                self.consts[name] = 1.0
                yield ((factor, have, consumer),)

    def _ways(self, hole: str, have: Value, consumer: Value | None) -> Iterator[tuple]:
        """One goal for each way to make a hole, with a budget for each; for a hole that was met before, it was made."""
        if hole in self.inner:
            yield ((self.inner[hole].traced.root, have, consumer),)
            return
        for reference in self.pattern.within[hole]:
            if reference.possible(self.shadow):
                self.inner[hole], self.steps = reference, 0
                yield ((reference.traced.root, have, consumer),)

    def _operator(self, want: Value, have: Value, consumer: Value | None) -> Iterator[tuple]:
        seen = []
        while have.op != want.op and (operand := _passed(have, self.pattern)) is not None:
            seen.append(have)
            have = operand
        if want in self.bound:
            if self.bound[want].number == have.number:
                yield ()
            else:
                self._fail(f"two different values where the pattern uses one result of {want.op}", have)
            return
        if have.op == "const":
            return  # another computation altogether, not worth a word
        if have.op != want.op:
            self._fail(f"expected {want.op}, found {_words(have)}", have)
            return
        if len(have.inputs) != len(want.inputs):
            self._fail(f"{want.op} of {len(have.inputs)} operands where the pattern has {len(want.inputs)}", have)
            return
        if have.attrs != want.attrs and want.op not in FREE_ATTRS:
            self._fail(f"{want.op}{list(have.attrs)} where the pattern needs {want.op}{list(want.attrs)}", have)
            return
        orders = [have.inputs, have.inputs[::-1]] if want.op in COMMUTATIVE else [have.inputs]
        for operands in orders:  # `solve` takes back what an order bound before it tries the next
            self.bound[want] = have
            if seen:
                self.passed.append((consumer, want, tuple(seen)))
            yield tuple((w, h, want) for w, h in zip(want.inputs, operands, strict=True))

    def _bind_const(self, want: Value, have: Value) -> bool:
        if have.op != "const":
            return self._fail(f"expected a constant, found {_words(have)}", have)
        given, (name, back) = have.const, self._const_hole(want)
        if name is None:
            same = math.isclose(given, want.const, rel_tol=1e-6)
            return same or self._fail(f"the constant {given!r} where the pattern has {want.const!r}", have)
        number = back(given) if given else given
        if name in self.consts:
            same = math.isclose(self.consts[name], number, rel_tol=1e-9)
            return same or self._fail(f"two values for the constant {name}: {self.consts[name]!r}, {number!r}", have)
        self.consts[name] = number
        return True

    def _const_hole(self, want: Value) -> tuple[str | None, Callable[[float], float]]:
        """Which constant of the reference this number stands for, and how to get it from one found in its place."""
        known, number = self._of(want).consts, want.const
        if number in known:
            return known[number], lambda given: given
        if number and 1.0 / number in known:
            return known[1.0 / number], lambda given: 1.0 / given
        if -number in known:
            return known[-number], lambda given: -given
        return None, lambda given: given

    def _bind_hole(self, want: Value, have: Value) -> bool:
        name = self._of(want).holes[want]
        while have.op == "cast" and (have.node is None or not is_narrowing(have)):
            if is_narrowing(have):
                self.rounded[name] = have.attrs[0]
            have = have.inputs[0]
        if have.op == "const":
            return False
        if have.meta is None or have.node is None:
            return self._fail(f"the pattern's tensor {name} would be {_words(have)}", have)
        if want in self.bound:
            same = self.bound[want].number == have.number
            return same or self._fail(f"two different tensors where the pattern uses {name} twice", have)
        self.bound[want] = have
        return True

    def _fail(self, reason: str, at: Value) -> bool:
        traced = self._traced()
        operators = sum(not any(p in t.holes or p in t.factors for t in traced) for p in self.bound)
        progress = operators / max(sum(len(t.operators) - len(t.factors) for t in traced), 1)
        if progress > self.progress or self.at is None:
            self.progress, self.reason, self.at = progress, reason, at
        return False


def _words(value: Value) -> str:
    if value.op == "const":
        return f"the constant {value.const!r}"
    return "an input of the graph" if value.op == "input" else value.op.removeprefix("opaque:")
