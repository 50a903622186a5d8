"""Exact changes to the real graph before anything is matched: they leave every number as it is.

Writes in place to a temporary that nothing else shares become the operators they are short for; casts that give their
operand back and results that nothing reads disappear; what is computed twice alike is computed once.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from rewriter.legality import may_alias, written_nodes
from rewriter.meta import draws_random_numbers, example, set_example, tensor_meta

aten = torch.ops.aten


def normalise(graph: fx.Graph) -> None:
    """Rewrite the graph of a lowered module in place."""
    for node in list(graph.nodes):
        if node.target in _LIKE_ANOTHER and tensor_meta(node) is not None:
            _to_dtype(node)
        if _is_its_operand(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        functional = _functional(node)
        if functional is not None and _is_temporary(node.args[0], node):
            _out_of_place(graph, node, functional)
    _merge(graph)
    for node in reversed(list(graph.nodes)):
        if not node.users and _is_pure(node):
            graph.erase_node(node)


def _merge(graph: fx.Graph) -> None:
    """One node for several that are the same view, or the same value without a gradient, of something never written.

    Not for values with a gradient: what reaches them would be summed before, not behind, the operator's derivative.
    """
    written, known = written_nodes(graph), {}
    for node in list(graph.nodes):
        meta = tensor_meta(node)
        if node.op != "call_function" or meta is None or not _is_pure(node):
            continue
        if node in written or any(operand in written for operand in node.all_input_nodes):
            continue  # it may be written between the two
        target, view = node.target, _is_view(node)
        if any(user.op == "output" for user in node.users) or (not view and (meta.requires_grad or _leaves(node))):
            continue
        key = target, repr((node.args, node.kwargs)), node.meta.get("ambient"), meta
        if known.setdefault(key, node) is not node:
            node.replace_all_uses_with(known[key])
            graph.erase_node(node)


def _is_view(node: fx.Node) -> bool:
    """Whether a call's result always shares the memory of an operand."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or may_alias(target):
        return False
    return any(r.alias_info for r in target._schema.returns)


def _shares(node: fx.Node) -> bool:
    """Whether it may."""
    return not isinstance(node.target, torch._ops.OpOverload) or may_alias(node.target) or _is_view(node)


def _leaves(node: fx.Node) -> bool:
    """Whether a value, or something that shares its memory, leaves the graph: the caller may write to it."""
    return any(user.op == "output" or (_shares(user) and _leaves(user)) for user in node.users)


def _is_pure(node: fx.Node) -> bool:
    """Whether a call does nothing but give its result."""
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if any(word in target.__name__ for word in _WITH_EFFECTS):
        return False
    return not target._schema.is_mutable and not draws_random_numbers(node)


# Operators with an effect that their schemas don't tell: they check something, or keep running statistics.
_WITH_EFFECTS = ("assert", "constrain", "batch_norm", "instance_norm")
# Casts to the dtype of another tensor, which is read for nothing else.
_LIKE_ANOTHER = {aten.type_as.default, aten.to.other}


def _to_dtype(node: fx.Node) -> None:
    source, meta = tensor_meta(node.args[0]), tensor_meta(node)
    if source is not None and source.device == meta.device and len(node.args) == 2 and not node.kwargs:
        node.target, node.args = aten.to.dtype, (node.args[0], meta.dtype)


def _is_its_operand(node: fx.Node) -> bool:
    """A cast to the dtype that a tensor has gives that very tensor."""
    if node.target is not aten.to.dtype or len(node.args) != 2 or node.kwargs:
        return False
    source, result = example(node.args[0]), example(node)
    if not isinstance(source, torch.Tensor) or type(source) is not type(result) or source.dtype != node.args[1]:
        return False
    return source.layout == torch.strided and source.requires_grad == result.requires_grad


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that `x.op_(...)` is the write in place of."""
    target = node.target
    if (
        node.op != "call_function"
        or not isinstance(target, torch._ops.OpOverload)
        or not isinstance(node.args[0] if node.args else None, fx.Node)
    ):
        return None
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten" or not name.endswith("_") or name.endswith("__"):
        return None
    written = [a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments]
    if not written or not written[0] or any(written[1:]):
        return None
    found = getattr(getattr(aten, name[:-1], None), target._overloadname, None)
    if found is None or found._schema.is_mutable or any(a.alias_info for a in found._schema.arguments):
        return None
    if torch.Tag.nondeterministic_seeded in found.tags or found is aten.copy.default:
        return None  # the latter has no derivative
    same = [a.name for a in found._schema.arguments] == [a.name for a in target._schema.arguments]
    return found if same else None


def _is_temporary(source: fx.Node, writer: fx.Node) -> bool:
    """Whether nothing but `source` itself can see what is written to it."""
    if source.op != "call_function" or not isinstance(source.target, torch._ops.OpOverload):
        return False
    if any(r.alias_info for r in source.target._schema.returns) or may_alias(source.target):
        return False
    value, result = example(source), example(writer)
    if not isinstance(value, torch.Tensor) or type(value) is not type(result) or value.layout != torch.strided:
        return False
    ambient = writer.meta.get("ambient")
    if value.requires_grad and ambient is not None and not ambient[0]:
        return False  # without grad mode the write changes the numbers but not their history
    for user in source.users:
        if user is writer or user.op == "output":
            continue
        target = user.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            return False
        shares = may_alias(target) or any(r.alias_info for r in target._schema.returns)
        if shares and (user.args[0] is source or not isinstance(user.args[0], fx.Node)):
            return False
    return all(argument is not source for argument in writer.args[1:])


def _out_of_place(graph: fx.Graph, node: fx.Node, functional: torch._ops.OpOverload) -> None:
    source = node.args[0]
    before = example(source)
    with graph.inserting_before(node):
        new = graph.call_function(functional, node.args, dict(node.kwargs))
    new.meta = dict(node.meta)
    value = _result(functional, node)
    if value is None or (value.shape, value.dtype, value.stride()) != (before.shape, before.dtype, before.stride()):
        graph.erase_node(new)
        return
    set_example(new, value)
    node.replace_all_uses_with(new)
    position = {n: i for i, n in enumerate(graph.nodes)}
    for user in list(source.users):
        if user not in (new, node) and position[user] > position[new]:
            user.replace_input_with(source, new)
    graph.erase_node(node)


def _result(functional: torch._ops.OpOverload, node: fx.Node) -> torch.Tensor | None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), example)
    try:
        return functional(*args, **kwargs)
    except Exception:  # nothing is lost but this one change
        return None
