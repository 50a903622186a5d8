"""Scaled dot-product attention (Vaswani et al., 2017): `softmax(scale * q k^T + mask) v`, without the scores in memory.

Becomes a call of PyTorch's scaled_dot_product_attention. Masks are added or filled in; one that the graph computes from
nothing but sizes is evaluated, and a causal one becomes `is_causal`. Keys and values repeated for groups of queries are
read unrepeated. A model's own call of scaled_dot_product_attention stays, unless one of these makes it better.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.nn import functional as F

from rewriter.meta import example
from rewriter.pattern import Call, Match, Pattern, Reference
from rewriter.shadow import Value

Q, K_T, V, SCORES = (2, 3, 4, 8), (2, 3, 8, 5), (2, 3, 5, 6), (2, 1, 4, 5)
HIDDEN = -1e8  # what a filled-in score has to be below: nothing of it is left after the softmax
CONDITION = torch.ones(SCORES, dtype=torch.bool)
# Masks in the order in which the model applies them: "add" a bias, "keep" scores where a condition holds, "drop" them.
MASKS = ((), ("add",), ("keep",), ("drop",), ("add", "add"), ("add", "keep"), ("add", "drop"), ("keep", "add"),
         ("drop", "add"))  # fmt: skip


def _masked(scores, masks, tensors, fills):
    for i, (kind, tensor) in enumerate(zip(masks, tensors, strict=True)):
        if kind == "add":
            scores = scores + tensor
        elif kind == "keep":
            scores = torch.where(tensor, scores, fills[f"fill{i}"])
        else:
            scores = scores.masked_fill(tensor, fills[f"fill{i}"])
    return scores


def _forms() -> Iterator[tuple[tuple[str, ...], str, bool, bool]]:
    """(masks, how scores are scaled, whether after the masks, whether there are no batch and heads)."""
    for flat in (False, True):
        for masks in MASKS:
            for scale in ("none", "const"):
                yield masks, scale, False, flat
        for masks in (("add",), ("keep",), ("drop",)):
            yield masks, "const", True, flat
    for scale in ("factor", "divisor"):
        for masks in ((), ("add",), ("keep",), ("drop",)):
            yield masks, scale, False, False
        yield ("add",), scale, True, False


def _references() -> tuple[Reference, ...]:
    references, bases = [], {}
    for masks, scaling, late, flat in _forms():

        def reference(*tensors, _masks=masks, _scaling=scaling, _late=late, _flat=flat, scale=1.0, **fills):
            q, k, v, *tensors = tensors
            if _scaling in ("factor", "divisor"):
                scale, *tensors = tensors
            scores = F.linear(q, k) if _flat else q @ k
            if _scaling != "none" and not _late:
                scores = scores / scale if _scaling == "divisor" else scores * scale
            scores = _masked(scores, _masks, tensors, fills)
            if _late:
                scores = scores / scale if _scaling == "divisor" else scores * scale
            return torch.softmax(scores, -1) @ v

        inputs = {"q": Q[2:], "k": (5, 8), "v": V[2:]} if flat else {"q": Q, "kt": K_T, "v": V}
        if scaling in ("factor", "divisor"):
            inputs[scaling] = ()
        inputs |= {f"mask{i}": SCORES if kind == "add" else CONDITION for i, kind in enumerate(masks)}
        fills = [f"fill{i}" for i, kind in enumerate(masks) if kind != "add"]
        consts = (*fills, *(["scale"] if scaling == "const" else []))
        variant = {"masks": masks, "late": late}
        references.append(Reference(reference, inputs, consts, variant, bases.get(flat)))
        bases.setdefault(flat, references[-1])
    library = {"library": True, "masks": ()}
    inputs = {"query": Q, "key": (2, 3, 5, 8), "value": V}
    references.append(Reference(of_library, inputs, (), library))
    references.append(Reference(of_library, {**inputs, "attn_mask": SCORES}, (), library))
    return tuple(references)


def of_library(query, key, value, attn_mask=None):
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


class Attention(Pattern):
    name = "attention"
    references = _references()

    def already(self, match: Match) -> str | None:
        if not match.variant.get("library"):
            return None
        dropout = match.attrs("attention")[3]  # what is dropped depends on the call that draws it
        if not dropout and (_grouped(match) or _causal(match)):
            return None
        return "scaled_dot_product_attention"

    def check(self, match: Match) -> str | None:
        q, k, v = (value.meta for value in _operands(match))
        flat = "k" in match.tensors  # without batch and heads
        if q.ndim not in ((2,) if flat else (3, 4)) or v.ndim != q.ndim or k.ndim != q.ndim:
            return f"queries of {q.ndim} dimensions"
        if q.shape[:-2] != k.shape[:-2] or q.shape[:-2] != v.shape[:-2]:
            return f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} differ in batch or heads"
        for name in ("factor", "divisor"):
            if name in match.tensors:
                meta = match.meta(name)
                if meta.numel() != 1 and (match.variant["late"] or meta.ndim > q.ndim or meta.shape[-1] != 1):
                    return f"scores are scaled by a tensor of shape {list(meta.shape)}"
        if not (q.static[-1] and v.static[-1]):
            return "the width of the heads changes between calls"
        for name, fill in match.consts.items():
            if name.startswith("fill") and not fill <= HIDDEN:
                return f"masked scores are set to {fill}, which leaves something of them"
        return None

    def replacement(self, match: Match) -> Call:
        masks = tuple(match.variant["masks"])
        note = {"masks": masks} if masks else {}
        library = match.variant.get("library")
        attrs = match.attrs("attention") if library else (False, match.consts.get("scale", 1.0), False)
        options = {"is_causal": attrs[0], "scale": attrs[1], "enable_gqa": attrs[2], "out_dtype": match.root.meta.dtype}
        tensors = [match[n] for n in match.tensors if n.startswith(("mask", "attn_mask"))]
        fills = tuple(match.consts.get(f"fill{i}") for i in range(len(masks)))
        if library and tensors:
            masks, fills = ("library",), (None,)
        if _causal(match):
            options["is_causal"], masks, tensors, fills = True, (), [], ()
            note = {"masks": "causal"}
        operands = [value.node for value in _operands(match)]
        grouped = _grouped(match) if not tensors else None
        if grouped:
            operands[1:], options["enable_gqa"] = [value.node for value in grouped], True
            note["grouped"] = True
        options["transposed"] = "kt" in match.tensors and not grouped
        options["scaling"] = next((n for n in ("factor", "divisor") if n in match.tensors), None)
        options["late"] = match.variant.get("late", False)
        scales = [match[options["scaling"]]] if options["scaling"] else []
        return Call(attention, (*operands, *scales, *tensors), {**options, "masks": masks, "fills": fills}, note)

    def cut(self, match: Match, longest: int) -> dict[int, int]:
        """Fewer tokens and, if there are many, fewer sequences, where no other dimension has that size."""
        q, k, v = (value.meta for value in _operands(match))
        tokens = k.shape[-1 if "kt" in match.tensors else -2], q.shape[-2]
        others = {q.shape[-1], v.shape[-1], *q.shape[:-2], *k.shape[:-2]}
        return {n: longest + (n != tokens[1]) for n in tokens if n > longest + 1 and n not in others}

    def sample(self, match: Match, name: str, shapes, generator: torch.Generator) -> torch.Tensor | None:
        """Conditions that leave each query its first key: a query without any has no defined result."""
        if match.meta(name).dtype != torch.bool:
            return None
        index = int(name[4:]) if name.startswith("mask") else -1
        visible = torch.rand(shapes[name], generator=generator, device=generator.device) < 0.7
        visible[..., 0] = True
        return ~visible if index >= 0 and match.variant["masks"][index] == "drop" else visible


def _operands(match: Match) -> tuple[Value, Value, Value]:
    names = (("q", "query"), ("k", "kt", "key"), ("v", "value"))
    return tuple(match.tensors[next(n for n in same if n in match.tensors)] for same in names)


def _grouped(match: Match) -> tuple[Value, Value] | None:
    """Key and value before they were repeated for the heads that share them; None if they were not."""
    q, k, v = _operands(match)
    if match.variant.get("library"):
        if match.attrs("attention")[2] or any(n == "attn_mask" for n in match.tensors) and not _causal(match):
            return None  # with a dense mask no fused kernel takes groups
    elif k.op == "permute" and k.attrs[0] == (0, 1, 3, 2):
        k = k.inputs[0]
    else:
        return None
    sources = tuple(_unrepeated(value) for value in (k, v))
    return None if None in sources or q.meta.ndim != 4 else sources


def _unrepeated(value: Value) -> Value | None:
    """The source of [B, H, ...] made by repeating each of fewer heads as often as it takes."""
    meta = value.meta
    if value.op == "opaque:repeat_interleave" and len(value.inputs) == 1 and value.node.args[2:3] in ((1,), (-3,)):
        source = value.inputs[0]
        return source if isinstance(value.node.args[1], int) and source.node is not None else None
    if value.op != "reshape" or value.inputs[0].op != "expand" or meta is None or meta.ndim != 4:
        return None
    wide = value.inputs[0]
    narrow = wide.inputs[0]
    source = narrow.inputs[0] if narrow.op == "reshape" else None
    if source is None or source.node is None or source.meta is None or wide.meta is None or source.meta.ndim != 4:
        return None
    batch, heads, *rest = source.meta.shape
    shape = wide.meta.shape
    if len(shape) != 5 or narrow.meta.shape != (batch, heads, 1, *rest) or shape != (batch, heads, shape[2], *rest):
        return None
    return source if meta.shape == (batch, heads * shape[2], *rest) else None


def _causal(match: Match) -> bool:
    """Whether the only mask hides exactly the later positions, whatever the inputs are."""
    library = match.variant.get("library")
    masks = ("library",) if library and "attn_mask" in match.tensors else match.variant["masks"]
    if len(masks) != 1:
        return False
    node = match["attn_mask" if library else "mask0"]
    mask = constant(node)
    if mask is None or mask.ndim < 2 or mask.shape[-1] != mask.shape[-2] or mask.numel() != mask.shape[-1] ** 2:
        return False
    mask = mask.reshape(mask.shape[-2:])
    if mask.dtype is torch.bool:
        visible = ~mask if masks[0] == "drop" else mask
    else:
        visible = mask == 0
        if masks[0] not in ("add", "library") or not bool((mask[~visible] <= HIDDEN).all()):
            return False
    return torch.equal(visible, torch.ones_like(visible).tril())


def constant(node: fx.Node, limit: int = 64) -> torch.Tensor | None:
    """The tensor that a node is in every call, since only sizes go into it; None if there is more to it."""
    value = example(node)
    if (
        not isinstance(value, torch.Tensor)
        or any(not isinstance(s, int) for s in value.shape)
        or value.numel() > 1 << 26
    ):
        return None
    order, todo = [], [node]
    while todo:
        current = todo.pop()
        target = current.target
        if current.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or len(order) > limit:
            return None
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            return None
        order.append(current)
        todo.extend(current.all_input_nodes)
    values: dict[fx.Node, torch.Tensor] = {}
    position = {n: i for i, n in enumerate(node.graph.nodes)}
    try:
        with torch.no_grad():
            for current in sorted(set(order), key=position.__getitem__):
                args, kwargs = fx.node.map_arg((current.args, current.kwargs), values.__getitem__)
                if "device" in kwargs:
                    kwargs = {**kwargs, "device": "cpu"}
                values[current] = current.target(*args, **kwargs)
    except Exception:  # an operator that can't run here: then the mask stays what it is
        return None
    return values[node]


def attention(q, k, v, *tensors, masks, fills, scale, scaling, late, is_causal, enable_gqa, out_dtype, transposed):
    """PyTorch's attention with the masks as one bias; the result laid out as a matrix product's."""
    k = k.transpose(-2, -1) if transposed else k
    after = scale  # what a mask is scaled by
    if scaling:
        after, *tensors = tensors
        after = 1 / after if scaling == "divisor" else after
        q = q * after.to(q.dtype)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    mask = _one_mask(masks, tensors, fills, after if late else None, dtype)
    shape = (*q.shape[:-1], v.shape[-1])
    if q.dim() < 4:  # the fused kernels take [B, H, T, D]
        q, k, v = (t.unsqueeze(-3) if t.dim() == 3 else t[None, None] for t in (q, k, v))
        mask = mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    return out.contiguous().view(shape).to(out_dtype)


def _one_mask(masks, tensors, fills, scale, dtype):
    if masks == ("library",):
        return tensors[0]
    if len(masks) == 1 and fills[0] == float("-inf"):  # no bias to add: a condition does
        return tensors[0] if masks[0] == "keep" else ~tensors[0]
    lowest = torch.finfo(dtype).min
    bias = None
    for kind, tensor, fill in zip(masks, tensors, fills, strict=True):
        if kind == "add":
            part = tensor if scale is None else tensor * scale
        else:
            hidden = ~tensor if kind == "keep" else tensor
            part = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, max(fill, lowest))
        bias = part if bias is None else bias + part
    return bias if bias is None else bias.clamp(min=lowest).to(dtype)


PATTERN = Attention()
