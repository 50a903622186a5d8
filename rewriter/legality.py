"""May this match be replaced? Exact conditions on the real graph; every refusal is a sentence with its node."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from rewriter.meta import TensorMeta, draws_random_numbers, example, tensor_meta
from rewriter.pattern import Call, Match
from rewriter.shadow import Shadow

# Values that are cheap to keep when something outside the match also reads them.
_CHEAP = {"cast", "copy", "slice", "reshape", "expand", "permute", "parts", "const"}


@dataclass(frozen=True)
class Site:
    """A legal replacement: the matches it serves, the nodes it makes dead, and what may leave lazily.

    inputs:  distinct real nodes the call reads
    outputs: real nodes it replaces, in the order of the matches
    covered: nodes between inputs and outputs, outputs included
    lazy:    covered nodes that only leave the graph as an output (computed on demand)
    before:  the node in front of which the call is placed
    compute: covered nodes that belong to this site alone
    """

    matches: tuple[Match, ...]
    call: Call
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    covered: tuple[fx.Node, ...]
    lazy: tuple[fx.Node, ...]
    before: fx.Node
    compute: frozenset[fx.Node]

    @property
    def pattern(self) -> str:
        return self.matches[0].pattern.name


class Illegal(Exception):
    """A condition that failed, in words, and the node it speaks of."""

    def __init__(self, reason: str, node: fx.Node):
        super().__init__(reason)
        self.reason, self.node = reason, node


class Legality:
    """Facts about one graph that every check needs: positions, aliases, in-place writes."""

    def __init__(
        self,
        graph: fx.Graph,
        shadow: Shadow,
        writes: dict[fx.Node, tuple[fx.Node, ...]],
        fakes: dict,
        lazy: bool = True,
    ):
        self.shadow, self.writes, self._fakes, self._lazy = shadow, writes, fakes, lazy
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.output = graph.find_nodes(op="output")[0]

    def site(self, matches: tuple[Match, ...]) -> Site:
        """The site of these matches; raises Illegal."""
        first = matches[0]
        for match in matches:
            reason = match.pattern.check(match)
            if reason is not None:
                words = isinstance(reason, str)
                raise Illegal(reason if words else f"its check gave {reason!r}, not a sentence", match.output)
            if match.rounded and not match.pattern.rounded_inputs:
                name = next(iter(match.rounded))
                raise Illegal(f"autocast rounds {name} to {match.rounded[name]} first", match.output)
        call = first.pattern.replacement(*matches)
        if not isinstance(call, Call):
            raise Illegal(f"its replacement is a {type(call).__name__}, not a Call", first.output)
        # Usually the holes; a replacement may also read what holes are cut from, and then the cuts are covered.
        arguments = pytree.tree_leaves((call.args, dict(call.kwargs)))
        inputs = tuple(dict.fromkeys(n for n in arguments if isinstance(n, fx.Node)))
        outputs = tuple(n for m in matches for n in m.outputs)
        if None in outputs:
            raise Illegal("one of its results is no value of the graph", first.output)
        covered = self._covered(inputs, outputs)
        self._check_inside(covered)
        lazy = self._check_escapes(covered, outputs, first.pattern.lazy)
        before = self._place(inputs, outputs)
        self._check_order(covered, inputs, outputs, before)
        self._check_writes(covered, inputs, outputs, before, bool(lazy))
        self._check_draws(covered, before)
        check_fake(call, inputs, outputs, self._fakes)
        bound = {v.node for m in matches for v in m.bound.values()} - {None}
        values = {node: self.shadow.of[node] for node in covered}
        work = {n for n, v in values.items() if v.op not in _CHEAP and v.node is n} - _made_of_sizes(covered)
        return Site(matches, call, inputs, outputs, covered, lazy, before, frozenset(bound | work))

    def _covered(self, inputs: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """Everything between inputs and outputs, outputs included, in graph order."""
        stops, seen, todo = set(inputs), set(), list(outputs)
        while todo:
            node = todo.pop()
            if node in seen or node in stops or isinstance(example(node), torch.SymInt):
                continue
            if node.op != "call_function" or not self._can_be_taken(node):
                raise Illegal(f"{node.name} lies inside the match but is not one of its inputs", node)
            seen.add(node)
            todo.extend(n for n in node.all_input_nodes if n.op != "get_attr")
        return tuple(sorted(seen, key=self.position.__getitem__))

    def _can_be_taken(self, node: fx.Node) -> bool:
        """Of higher-order operators, those that the shadow looks into."""
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
        return node.meta.get("forward") is not None and not self.shadow.of[node].op.startswith("opaque:")

    def _check_inside(self, covered: tuple[fx.Node, ...]) -> None:
        states = set()
        for node in covered:
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                raise Illegal(f"{node.name} writes in place inside the match", node)
            if type(example(node)) not in PLAIN and isinstance(example(node), torch.Tensor):
                raise Illegal(f"{node.name} is a {type(example(node)).__name__}", node)
            states.add(node.meta.get("ambient"))
        if len(states) > 1:
            raise Illegal("grad mode or autocast changes inside the match", covered[-1])

    def _check_escapes(
        self, covered: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...], lazy_allowed: bool
    ) -> tuple[fx.Node, ...]:
        inside, lazy = set(covered), []
        lazy_allowed = (
            lazy_allowed and self._lazy and not any(map(draws_random_numbers, covered))
        )  # later it would draw others
        free = _made_of_sizes(covered)  # whoever else reads those may go on doing so
        for node in covered:
            outside = [u for u in node.users if u not in inside]
            if node in outputs or not outside or node in free:
                continue
            can_wait = lazy_allowed and isinstance(example(node), torch.Tensor) and not _takes_sizes(node, inside)
            if can_wait and outside == [self.output]:
                lazy.append(node)
            elif self.shadow.of[node].op not in _CHEAP and self.shadow.of[node].node is node:
                raise Illegal(f"its intermediate result {node.name} is used again by {outside[0].name}", node)
            elif (product := self._product_behind(node, inside - {*outputs, *free})) is not None:
                raise Illegal(f"its intermediate result {product.name} is used again by {outside[0].name}", product)
        return tuple(lazy)

    def _product_behind(self, node: fx.Node, inside: set[fx.Node]) -> fx.Node | None:
        """The product with a weight that a view is a view of: kept for whoever reads the view, it is made twice."""
        seen, todo = set(), [node]
        while todo:
            node = todo.pop()
            if node not in inside or node in seen:
                continue
            seen.add(node)
            value = self.shadow.of[node]
            by_matrix = value.op == "matmul" and any(v.meta is not None and v.meta.ndim == 2 for v in value.inputs)
            if value.op == "linear" or by_matrix:
                return node
            if value.op in _CHEAP:
                todo.extend(node.all_input_nodes)
        return None

    def _place(self, inputs: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...]) -> fx.Node:
        users = [u for node in outputs for u in node.users] or [self.output]
        first_use = min(users, key=self.position.__getitem__)
        last_output = max(outputs, key=self.position.__getitem__)
        before = min(first_use, last_output, key=self.position.__getitem__)
        first_output = min(outputs, key=self.position.__getitem__)
        while before is not first_output and before.meta.get("ambient") != first_output.meta.get("ambient"):
            before = before.prev  # the first use is under another grad mode or autocast: not there
        for node in inputs:
            if self.position[node] >= self.position[before]:
                raise Illegal(f"{node.name} comes after the first use of a result", node)
        return before

    def _check_order(self, covered: tuple, inputs: tuple, outputs: tuple, before: fx.Node) -> None:
        """Convexity: no input may depend on an output (only possible when several outputs are joined)."""
        if len(outputs) < 2:
            return
        low, high = self.position[covered[0]], self.position[before]
        flow = nx.DiGraph()
        for node in _window(covered[0], high - low):
            flow.add_node(node)
            flow.add_edges_from((i, node) for i in node.all_input_nodes if self.position[i] >= low)
        for source in outputs:
            for sink in inputs:
                if source in flow and sink in flow and nx.has_path(flow, source, sink):
                    raise Illegal(f"{sink.name} depends on {source.name}", sink)

    def _check_writes(self, covered: tuple, inputs: tuple, outputs: tuple, before: fx.Node, lazy: bool) -> None:
        high = self.position[before]
        inside = set(covered)
        for node in (*inputs, *covered):
            if node not in self.writes:
                continue
            low = min((self.position[u] for u in node.users if u in inside), default=self.position[covered[0]])
            for writer in self.writes[node]:
                at = self.position[writer]
                if low < at < high or (node in covered and not (node in outputs and at >= high)):
                    raise Illegal(f"{writer.name} writes {node.name} in place", writer)
                if node in inputs and at >= high and any(tensor_meta(n).requires_grad for n in outputs):
                    raise Illegal(f"{writer.name} writes {node.name} in place, which backward may need", writer)
                if node in inputs and at >= high and lazy:
                    raise Illegal(f"{writer.name} writes {node.name} in place, of which a result is made later", writer)

    def _check_draws(self, covered: tuple, before: fx.Node) -> None:
        """Random numbers are drawn in the order in which the model draws them."""
        own = [node for node in covered if draws_random_numbers(node)]
        if not own:
            return
        if len(own) > 1:
            raise Illegal("random numbers are drawn twice inside the match", own[1])
        for node in _window(own[0].next, self.position[before] - self.position[own[0]] - 1):
            if draws_random_numbers(node):
                raise Illegal(f"{node.name} draws random numbers before the replacement does", node)


def _made_of_sizes(covered: tuple[fx.Node, ...]) -> set[fx.Node]:
    """Those that no tensor goes into: masks, positions."""
    free: set[fx.Node] = set()
    for node in covered:
        if all(n in free or isinstance(example(n), torch.SymInt) for n in node.all_input_nodes):
            free.add(node)
    return free


def _takes_sizes(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether it is computed from a size that changes between calls: on demand, it would be that of another call."""
    seen, todo = set(), [node]
    while todo:
        for operand in todo.pop().all_input_nodes:
            if isinstance(example(operand), torch.SymInt):
                return True
            if operand in inside and operand not in seen:
                seen.add(operand)
                todo.append(operand)
    return False


def _window(node: fx.Node, length: int) -> Iterator[fx.Node]:
    for _ in range(length):
        yield node
        node = node.next


PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)


def written_nodes(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """For each node that shares memory with something written in place: the writing nodes."""
    alias: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while node in alias:
            if alias[node] in alias:
                alias[node] = alias[alias[node]]
            node = alias[node]
        return node

    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            schema = target._schema
            for i, argument in enumerate(schema.arguments):
                info = argument.alias_info
                if info is None:
                    continue
                given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                for source in (n for n in pytree.tree_leaves(given) if isinstance(n, fx.Node)):
                    if info.is_write:
                        writers.setdefault(root(source), []).append(node)
                    _join(alias, root, node, source)
            if not any(a.alias_info for a in schema.arguments) and may_alias(target):
                _join(alias, root, node, node.args[0])
        else:
            for source in node.all_input_nodes:  # unknown call: its results may share memory with its inputs
                _join(alias, root, node, source)
            if node.op == "call_method" and isinstance(target, str) and target.endswith("_"):
                writers.setdefault(root(node.args[0]), []).append(node)
            elif getattr(target, "__name__", "").startswith("i") and getattr(target, "__module__", "") == "_operator":
                if target.__name__ in _IN_PLACE and isinstance(node.args[0], fx.Node):
                    writers.setdefault(root(node.args[0]), []).append(node)
            elif target is _SETITEM:
                writers.setdefault(root(node.args[0]), []).append(node)
    by_root: dict[fx.Node, list[fx.Node]] = {}
    for source, nodes in writers.items():
        by_root.setdefault(root(source), []).extend(nodes)
    if not by_root:
        return {}
    return {node: tuple(by_root[root(node)]) for node in graph.nodes if root(node) in by_root}


_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior", "ixor", "imatmul", "ifloordiv", "imod"}
_SETITEM = operator.setitem
# Composite operators that return their input, or a view of it, where nothing has to change.
_MAYBE_VIEWS = {"to", "reshape", "contiguous", "flatten", "type_as", "dropout", "expand_as", "view_as", "unflatten"}


def may_alias(target: torch._ops.OpOverload) -> bool:
    return target._schema.name.removeprefix("aten::") in _MAYBE_VIEWS


def _join(alias: dict, root, a: fx.Node, b: fx.Node) -> None:
    a, b = root(a), root(b)
    if a is not b:
        alias[a] = b


def check_fake(call: Call, inputs: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...], known: dict) -> None:
    """Run the replacement on fake tensors: shape, dtype, stride, device and requires_grad must be the original's.

    `known` keeps outcomes: equal calls on equal metas need one run.
    """
    place = {node: i for i, node in enumerate(inputs)}
    arguments = pytree.tree_map_only(fx.Node, lambda n: ("input", place[n]), (call.args, dict(call.kwargs)))
    metas = tuple(tensor_meta(n) for n in (*inputs, *outputs))
    key = (call.fn, repr(arguments), metas, outputs[0].meta.get("ambient"))
    if key not in known:
        known[key] = _fake_outcome(call, outputs)
    if known[key] is not None:
        reason, index = known[key]
        raise Illegal(reason, outputs[index])


def _fake_outcome(call: Call, outputs: tuple[fx.Node, ...]) -> tuple[str, int] | None:
    """What is wrong with the replacement's results, and with which; None where all is well."""
    ambient = outputs[0].meta.get("ambient")
    with FakeTensorMode(), torch.set_grad_enabled(ambient is None or ambient[0]):
        fakes: dict[fx.Node, torch.Tensor] = {}

        def fake(node: fx.Node) -> torch.Tensor:
            if node not in fakes:
                fakes[node] = _fake(tensor_meta(node))
            return fakes[node]

        args, kwargs = pytree.tree_map_only(fx.Node, fake, (call.args, dict(call.kwargs)))
        try:
            results = call.fn(*args, **kwargs)
        except Exception as error:
            return f"the replacement failed on fake tensors: {type(error).__name__}: {error}", 0
    results = results if isinstance(results, tuple | list) else (results,)
    if len(results) != len(outputs):
        return f"the replacement gives {len(results)} results, not {len(outputs)}", 0
    for i, (result, node) in enumerate(zip(results, outputs, strict=True)):
        if not isinstance(result, torch.Tensor):
            return f"the replacement gives a {type(result).__name__}, not a tensor", i
        old, new = tensor_meta(node), TensorMeta.of(result)
        for what in ("shape", "dtype", "device", "requires_grad"):
            if getattr(old, what) != getattr(new, what):
                return f"the replacement's {what} is {getattr(new, what)}, not {getattr(old, what)}", i
        if _significant(old) != _significant(new):
            return f"the replacement's strides are {new.stride}, not {old.stride}", i
    return None


def _fake(meta: TensorMeta) -> torch.Tensor:
    tensor = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=meta.device)
    return tensor.requires_grad_(meta.requires_grad) if meta.requires_grad else tensor


def significant_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of dimensions longer than one: no other stride is ever used. A tensor without elements has none."""
    return tuple(s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and tensor.numel())


def _significant(meta: TensorMeta) -> tuple[int, ...]:
    return tuple(s for s, n in zip(meta.stride, meta.shape, strict=True) if n > 1 and meta.numel())
