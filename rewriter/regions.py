"""What is compiled as one piece: repeated blocks, the rest of a body, and the outermost forward. Structure only.

A block is a child of an outermost ModuleList (or of a Sequential of equal children) that has submodules with
parameters. The module that owns such a list is a body. A body is opaque to the outermost forward where a head lies
outside of it; a body with its own head is captured as one graph together with its blocks, so that head and loss can be
fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# Nothing to rewrite in these alone: a matrix product or a lookup.
_BARE = (nn.Linear, nn.Embedding, nn.Dropout, nn.Identity, nn.Bilinear, nn.EmbeddingBag)
_LISTS = (nn.ModuleList, nn.ModuleDict)  # have no forward of their own
_CONTAINERS = (*_LISTS, nn.Sequential)


@dataclass(frozen=True)
class Region:
    """A module and how it is compiled.

    kind: "block" and "part" through their own forward, "body" not at all (it calls them), "inlined" as a piece of the
    model's graph, "model" as the outermost forward.
    """

    path: str
    module: nn.Module
    kind: str


def find_regions(model: nn.Module) -> list[Region]:
    """All regions of a model; the model itself last."""
    groups = list(_block_groups(model))
    blocks = {id(m) for _, group in groups for _, m in group}
    owners: dict[int, tuple[str, nn.Module]] = {}
    for path, _ in groups:
        owner_path, owner = _owner(model, path)
        owners[id(owner)] = (owner_path, owner)
    regions: list[Region] = []
    opaque = {i for i, (_, body) in owners.items() if body is not model and _is_opaque(model, body, blocks)}
    for path, group in groups:
        kind = "block" if id(_owner(model, path)[1]) in opaque else "inlined"
        regions += [Region(p, m, kind) for p, m in group]
    for key in opaque:
        body_path, body = owners[key]
        for name, child in _children(body):
            if _is_part(child, blocks, owners):
                regions.append(Region(f"{body_path}.{name}", child, "part"))
        regions.append(Region(body_path, body, "body"))
    seen: set[int] = set()
    unique = [r for r in regions if id(r.module) not in seen and not seen.add(id(r.module))]
    path, outermost = _outermost(model, owners) if opaque else ("", model)
    return [*unique, Region(path, outermost, "model")]


def _outermost(model: nn.Module, owners: dict) -> tuple[str, nn.Module]:
    """The module that holds bodies and head, without wrappers around it that own nothing themselves."""
    path, module = "", model
    while len(children := list(module.named_children())) == 1 and not module._parameters:
        name, child = children[0]
        if id(child) in owners or isinstance(child, _CONTAINERS):
            break
        path, module = f"{path}.{name}" if path else name, child
    return path, module


def _block_groups(model: nn.Module) -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    """(path of the list, its blocks) for every outermost list of blocks."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, list]]:
        for name, child in module.named_children():
            child_path = f"{path}.{name}" if path else name
            blocks = _blocks_of(child, child_path)
            if blocks:
                yield child_path, blocks
            else:
                yield from walk(child, child_path)

    yield from walk(model, "")


def _blocks_of(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    children = [(f"{path}.{n}", c) for n, c in module.named_children()]
    working = [(p, c) for p, c in children if _does_work(c)]
    if isinstance(module, nn.ModuleList):
        return working
    if isinstance(module, nn.Sequential) and len(working) >= 2 and len({type(c) for _, c in working}) == 1:
        return working
    return []


def _does_work(module: nn.Module) -> bool:
    if isinstance(module, _LISTS):
        return False
    inner = [m for m in module.modules() if m is not module and m._parameters]
    return len(inner) >= 2


def _owner(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The nearest ancestor of a list that isn't a container itself."""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if not isinstance(module, _CONTAINERS):
            return path, module
    return "", model


def _is_opaque(model: nn.Module, body: nn.Module, blocks: set[int]) -> bool:
    inside = {id(m) for m in body.modules()}
    outside = any(m._parameters for m in model.modules() if id(m) not in inside)
    return outside and not _has_head(body, blocks)


def _has_head(body: nn.Module, blocks: set[int]) -> bool:
    """Whether a body projects back to the size of one of its own vocabularies outside of its blocks."""
    vocabularies: set[int] = set()
    widths: set[int] = set()

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if id(child) in blocks:
                continue
            weight = child._parameters.get("weight")
            if weight is not None and weight.dim() == 2:
                (vocabularies if isinstance(child, nn.Embedding) else widths).add(weight.shape[0])
            walk(child)

    walk(body)
    return bool(vocabularies & widths)


def _children(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The children of a module and, in the place of a list, what it holds."""
    for name, child in module.named_children():
        if type(child) in _LISTS:
            yield from _children(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


def _is_part(module: nn.Module, blocks: set[int], owners: dict) -> bool:
    if isinstance(module, _BARE) and not list(module.children()):
        return False
    for inner in module.modules():
        if id(inner) in blocks or id(inner) in owners:
            return False
    if any(True for _ in module.parameters()):
        return True
    # A norm without weights has nothing at all; one with buffers alone computes tables of angles, once for all blocks.
    return not list(module.children()) and not list(module.buffers())
