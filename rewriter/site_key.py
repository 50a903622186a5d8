"""What a proof or a measurement of a site depends on, in a form that can be compared: equal sites are tried once."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx

from rewriter.legality import Site
from rewriter.meta import TensorMeta, example, hint, tensor_meta


def key_of(site: Site) -> Any:
    """Hashable; equal for sites that compute the same on equal metas and are replaced by the same call."""
    body, call, outputs = _texts(site)
    metas = tuple(tensor_meta(n) for n in site.inputs)
    return site.pattern, body, metas, (site.call.fn, *call), outputs, site.outputs[0].meta.get("ambient")


def words_of(site: Site) -> dict[str, Any]:
    """The same in plain values that mean the same in another process. What changes between calls is what it is now."""
    body, call, outputs = _texts(site)
    fn = site.call.fn
    name = f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', repr(fn))}"
    inputs = [_meta(tensor_meta(n)) for n in site.inputs]
    ambient = repr(site.outputs[0].meta.get("ambient"))
    pattern = repr(sorted(vars(site.matches[0].pattern).items()))
    given = {"pattern": site.pattern, "settings": pattern, "body": list(body), "inputs": inputs, "ambient": ambient}
    return given | {"call": [name, *call], "outputs": list(outputs)}


def _texts(site: Site) -> tuple[tuple[str, ...], tuple[str, str], tuple[str, ...]]:
    """The operators, the arguments of the call and the results, with nodes named by their place."""
    names = {node: f"%{i}" for i, node in enumerate(site.inputs)}
    body = []
    for node in site.covered:
        names[node] = f"%{len(names)}"
        body.append(f"{node.target}{_text(node.args, names)}{_text(dict(node.kwargs), names)}")
    call = _text(site.call.args, names), _text(dict(site.call.kwargs), names)
    return tuple(body), call, tuple(names[n] for n in site.outputs)


def _text(tree: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(tree, fx.Node):
        return names[tree] if tree in names else _outside(tree)
    if isinstance(tree, list | tuple):
        return "(" + ",".join(_text(t, names) for t in tree) + ")"
    if isinstance(tree, dict):
        return "{" + ",".join(f"{k}:{_text(v, names)}" for k, v in sorted(tree.items())) + "}"
    return repr(tree)


def _outside(node: fx.Node) -> str:
    """A node that is neither input nor part of a site: a size, or the body of an autograd.Function."""
    if isinstance(example(node), torch.SymInt):
        with contextlib.suppress(ValueError):  # it depends on data
            return f"size {hint(example(node))}"
        return node.name
    body = getattr(node.graph.owning_module, node.target, None) if node.op == "get_attr" else None
    return str(_whole(body)) if isinstance(body, fx.GraphModule) else node.name


def _whole(module: fx.GraphModule) -> list[str]:
    """A graph and those that it calls."""
    inner = [getattr(module, n.target, None) for n in module.graph.find_nodes(op="get_attr")]
    return [str(module.graph), *(str(_whole(m)) for m in inner if isinstance(m, fx.GraphModule))]


def _meta(meta: TensorMeta) -> str:
    return f"{meta.dtype} {list(meta.shape)} {list(meta.stride)} {meta.device.type} {meta.requires_grad}"
