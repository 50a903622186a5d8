"""Scaled dot-product attention (Vaswani et al., 2017): `softmax(scale * q k^T + mask) v`, without the scores in memory.

Becomes a call of PyTorch's scaled_dot_product_attention, or of our own kernel where scores are capped or biased, where
a sink takes a share of the softmax, or where probabilities are dropped (kernels/sdpa.py). What a model does to its
scores is read back step by step (attention_scores.py). A mask that the graph computes from nothing but sizes is
evaluated, and a causal one becomes `is_causal`. Keys and values repeated for groups of queries are read unrepeated. A
model's own call of scaled_dot_product_attention stays, unless one of these makes it better.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from rewriter.constant import constants
from rewriter.kernels.sdpa import attention
from rewriter.meta import TensorMeta
from rewriter.pattern import Call, Match, Pattern, Reference
from rewriter.patterns.attention_scores import HIDDEN, MASKS, SCALINGS, Scores, Step, Stray, real, trace_back
from rewriter.shadow import Value, is_row_operator, zeroed_in_part

Q, K, V, SCORES, SINK = (2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 6), (2, 3, 4, 5), (2, 3, 4, 1)


def plain(scores, v):
    return torch.softmax(scores, -1) @ v


def with_sink(scores, sink, v):
    return torch.softmax(torch.cat((scores, sink), -1), -1)[..., :-1] @ v


def with_sink_behind(scores, sink, v):
    share = torch.sigmoid(torch.logsumexp(scores, -1) - sink)  # of the softmax that the sink leaves
    return torch.softmax(scores, -1) @ v * share.unsqueeze(-1)


def of_library(query, key, value, attn_mask=None):
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


class Attention(Pattern):
    name = "attention"
    references = (
        Reference(with_sink_behind, {"scores": SCORES, "sink": SINK[:-1], "v": V}),
        Reference(with_sink, {"scores": SCORES, "sink": SINK, "v": V}),
        Reference(plain, {"scores": SCORES, "v": V}),
        Reference(of_library, {"query": Q, "key": K, "value": V}),
        Reference(of_library, {"query": Q, "key": K, "value": V, "attn_mask": SCORES}),
    )
    row_operators = True  # models that put batch and heads into one dimension take them apart for the mask
    zeroing = True
    rounded_inputs = True
    lazy = True  # probabilities that a model returns with the result

    def already(self, match: Match) -> str | None:
        if not _is_library(match):
            return None
        dropout = match.attrs("attention")[3]  # what is dropped depends on the call that draws it
        if not dropout and (_grouped(match) or _causal(match)):
            return None
        return "scaled_dot_product_attention"

    def check(self, match: Match) -> str | None:
        if _is_library(match):
            return None
        try:
            scores = _scores(match)
        except Stray as stray:
            return str(stray)
        q, k, v = (value and value.meta for value in _operands(match))
        if None in (q, k, v) or v.ndim not in (2, 3, 4, 5) or q.ndim != k.ndim:
            return "queries, keys and values are not laid out as heads"
        if q.ndim != v.ndim and (q.ndim, v.ndim) != (3, 4):
            return f"queries of {q.ndim} dimensions and values of {v.ndim}"
        if not _same_heads(q, k, v):
            return f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} differ in batch or heads"
        if not (q.static[-1] and v.static[-1]):
            return "the width of the heads changes between calls"
        if (reason := _masks_check(scores)) is not None:
            return reason
        for step in scores.steps:
            if step.kind in ("multiply", "divide"):
                meta = step.value.meta
                rows = meta.numel() == 1 or (meta.ndim <= q.ndim == step.ndim and meta.shape[-1] == 1)
                before = [s.kind for s in scores.steps[: scores.steps.index(step)]]
                alone = "cap" not in [s.kind for s in scores.steps] and not {*before} & {*MASKS}
                if not rows and (not alone or meta.requires_grad or step.kind == "divide"):
                    return f"scores are scaled by a tensor of shape {list(meta.shape)}"
        if "sink" in match.tensors and _sinks(match) is None:
            return f"the sink has shape {list(match.meta('sink').shape)}, not one number for each head or query"
        return _passed_check(match, scores)

    def replacement(self, match: Match) -> Call:
        library, note = _is_library(match), {}
        causal = _causal(match)
        options = {"out_dtype": match.root.meta.dtype, "contiguous": not library or match.root.meta.is_contiguous()}
        own: dict = {}
        if library:
            options["is_causal"], options["scale"], options["enable_gqa"], _ = match.attrs("attention")
            tensors, steps = [match[n] for n in match.tensors if n == "attn_mask" and not causal], []
        else:
            scores = _scores(match)
            kept = [s for s in scores.steps if not (causal and s.kind in (*MASKS, "floor"))]
            kept += _zeroed(match)
            tensors, steps = [s.value.node for s in kept if s.value], [(s.kind, s.number, s.ndim) for s in kept]
            dropped = _dropped(match)
            own["softcap"] = next((s.number for s in scores.steps if s.kind == "cap"), None)
            own["dropout"] = dropped.attrs[0] if dropped else 0.0
            options["drop_dtype"] = dropped.meta.dtype if dropped else None
            options["heads"] = _heads(match, scores)
            options["dtype"] = torch.promote_types(scores.product.meta.dtype, match.dtype("matmul"))
            own["sink"] = "sink" in match.tensors
        options["is_causal"] = options.get("is_causal") or causal
        masks = [kind for kind, _, _ in steps if kind in (*MASKS, "floor", "retain", "remove")]
        note |= {"masks": "causal"} if causal else {"masks": tuple(masks)} if masks else {}
        note |= {name: value for name, value in own.items() if value}
        operands = [value.node for value in _operands(match)]
        grouped = _grouped(match)
        if grouped:
            operands[1:], options["enable_gqa"] = [value.node for value in grouped], True
            note["grouped"] = True
        options["transposed"] = not library and scores.product.op == "matmul" and not grouped
        sinks = [_sinks(match).node] if own.get("sink") else []
        return Call(attention, (*operands, *sinks, *tensors), {**options, **own, "steps": tuple(steps)}, note)

    def cut(self, match: Match, longest: int) -> dict[int, int]:
        """Fewer tokens and, if there are many, fewer sequences, where no other dimension has that size."""
        q, k, v = (value.meta for value in _operands(match))
        tokens = v.shape[-2], q.shape[-2]
        others = {q.shape[-1], v.shape[-1], *q.shape[:-2], *v.shape[:-2]}
        return {n: longest + (n != tokens[1]) for n in tokens if n > longest + 1 and n not in others}

    def sample(self, match: Match, name: str, shapes, generator: torch.Generator) -> torch.Tensor | None:
        """Masks that hide some keys, and a single one from the last query all, if its result is defined then."""
        if _is_library(match):
            condition = name == "attn_mask" and match.meta(name).dtype == torch.bool
            kind, number = "keep" if condition else "", -math.inf
            step = None
        else:
            step = next((s for s in _scores(match).steps if s.value and s.value.node.name == name), None)
            kind, number = (step.kind, step.number) if step else ("", None)
        alone = step is not None and _mask(match) == step  # several together may hide by more than a number holds
        if kind not in MASKS or (step and step.value.meta.requires_grad) or (kind in ("add", "subtract") and not alone):
            return None
        visible = torch.rand(shapes[name], generator=generator, device=generator.device, dtype=torch.float32) < 0.7
        visible[..., 0] = True
        if number != -math.inf and visible.dim() > 1:
            visible[..., -1, :] = visible.shape[-2] == 1
        if kind in ("keep", "drop"):
            return ~visible if kind == "drop" else visible
        lowest = torch.finfo(step.value.meta.dtype).min / 4
        bias = torch.randn(visible.shape, generator=generator, device=generator.device, dtype=torch.float32)
        return bias.masked_fill(~visible, lowest if kind == "add" else -lowest)


def _is_library(match: Match) -> bool:
    return "query" in match.tensors


def _scores(match: Match) -> Scores:
    return trace_back(match.tensors["scores"])


def _operands(match: Match) -> tuple[Value, Value, Value]:
    """Queries, keys (or, behind a matmul, their transpose) and values."""
    if _is_library(match):
        return tuple(match.tensors[name] for name in ("query", "key", "value"))
    return (*map(real, _scores(match).product.inputs), match.tensors["v"])


def _masks_check(scores: Scores) -> str | None:
    """Whether masks, of which there may be several, can be put together: one bias, one condition, one number."""
    fill = floor = None
    for step in scores.steps:
        if step.kind in ("keep", "drop"):
            if fill not in (None, -math.inf, step.number) and step.number != -math.inf:
                return f"scores are filled by {fill} and by {step.number}"
            fill = step.number if fill in (None, -math.inf) else fill
        elif step.kind in ("multiply", "divide") and fill is not None:
            return "scores are scaled by a tensor after they are filled by a number"
        elif step.kind == "floor":
            floor = step.number
        elif step.kind == "scale" and not step.number > 0 and (fill == -math.inf or floor is not None):
            return f"scores are scaled by {step.number} after they are masked"
        elif step.kind == "scale" and fill is not None:
            fill *= step.number
    return None


def _same_heads(q: TensorMeta, k: TensorMeta, v: TensorMeta) -> bool:
    """Whether batch and heads are the same in all three, or one head of keys and values serves several of queries."""
    if q.ndim != v.ndim:
        return q.shape[:-2] == k.shape[:-2]
    *lead, heads = q.shape[:-2] or (1,)
    shared = q.ndim in (4, 5) and k.shape[:-2] == v.shape[:-2] == (*lead, 1)
    return shared or q.shape[:-2] == k.shape[:-2] == v.shape[:-2]


def _dropped(match: Match) -> Value | None:
    return next((v for _, _, values in match.passed for v in values if v.op == "dropout"), None)


def _zeroed(match: Match) -> list[Step]:
    """Conditions under which probabilities are set to 0."""
    found = [v for _, _, values in match.passed for v in values if v.op == "where"]
    kinds = ["retain" if zeroed_in_part(v) is v.inputs[1] else "remove" for v in found]
    return [Step(k, real(v.inputs[0]), None, v.meta.ndim) for k, v in zip(kinds, found, strict=True)]


def _passed_check(match: Match, scores: Scores) -> str | None:
    """Whether what stands between the operators is what a replacement knows of."""
    for consumer, producer, values in match.passed:
        for value in values:
            if zeroed_in_part(value) is not None:
                behind = consumer == "matmul" and producer in ("softmax", "sink_softmax")
                known = value.op == "dropout" or (real(value.inputs[0]) is not None and value.meta is not None)
                if not behind or not known:
                    return f"{value.op} stands between {producer} and {consumer}"
                if value.op == "dropout" and (value.attrs[0] >= 1 or [v.op for v in values].count("dropout") > 1):
                    return f"dropout of {value.attrs[0]} stands between {producer} and {consumer}"
            elif is_row_operator(value) and value.op != "reshape":
                return f"{value.op} stands between {producer} and {consumer}"
    batches, q = _batches(match, scores), _operands(match)[0].meta
    pairs = [b for b in batches if len(b) == 2]
    if batches and (q.ndim != 3 or len(pairs) != 1 or batches - {*pairs} != {q.shape[:-2]} or "sink" in match.tensors):
        return f"scores are regrouped: {sorted(batches)}"
    return None


def _batches(match: Match, scores: Scores) -> frozenset[tuple[int, ...]]:
    """The leading dimensions that scores and probabilities have, where they are regrouped."""
    regrouped = [v for _, _, values in match.passed for v in values if v.op == "reshape"]
    return scores.batches | {m.shape[:-2] for v in regrouped for m in (v.meta, v.inputs[0].meta)}


def _heads(match: Match, scores: Scores) -> int | None:
    """The number of heads, where batch and heads are one dimension of the queries, and two elsewhere."""
    return next((b[1] for b in _batches(match, scores) if len(b) == 2), None)


def _sinks(match: Match) -> Value | None:
    """The sink before it was broadcast: [H], or what broadcasts to [B, H, Tq] or [B, H, Tq, 1]."""
    given, queries = match.tensors["sink"], _operands(match)[0].meta.shape[:-1]
    if len(queries) != 3 or given.meta is None:
        return None
    shape = given.meta.shape[:-1] if given.meta.ndim == 4 else given.meta.shape
    if len(shape) > 3 or any(n not in (1, m) for n, m in zip(shape[::-1], queries[::-1], strict=False)):
        return None
    narrow = given
    while narrow.op in ("expand", "copy"):
        narrow = narrow.inputs[0]
    source = narrow.inputs[0] if narrow.op == "reshape" else None
    if source is None or source.node is None or source.meta is None or source.meta.shape != queries[1:2]:
        return given
    shape = narrow.meta.shape[:-1] if narrow.meta.ndim == 4 else narrow.meta.shape
    return source if shape[-2:-1] == queries[1:2] and math.prod(shape) == queries[1] else given


def _grouped(match: Match) -> tuple[Value, Value] | None:
    """Key and value before they were repeated for the heads that share them; None if they were not."""
    q, k, v = _operands(match)
    if _is_library(match):
        if match.attrs("attention")[2] or ("attn_mask" in match.tensors and not _causal(match)):
            return None  # with a dense mask none of PyTorch's fused kernels takes groups
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


def _mask(match: Match) -> Step | None:
    """The only mask among the steps."""
    masks = [s for s in _scores(match).steps if s.kind in MASKS]
    return masks[0] if len(masks) == 1 else None


def _causal(match: Match) -> bool:
    """Whether the only mask hides exactly the later positions, whatever the inputs are: then each query sees a key."""
    if _is_library(match):
        kind, value = "add", match.tensors.get("attn_mask")
    else:
        step, steps = _mask(match), _scores(match).steps
        kind, value = (step.kind, step.value) if step else ("", None)
        if step and any(s.kind in SCALINGS for s in steps[steps.index(step) + 1 :]):
            return False  # which may turn what is hidden into what is seen
        if step and any(s.number > HIDDEN for s in (step, *steps) if s.kind in ("keep", "drop", "floor")):
            return False
    masks = constants(value.node) if value is not None and value.node is not None else []
    return bool(masks) and all(_hides_later(mask, kind) for mask in masks)


def _hides_later(mask: torch.Tensor, kind: str) -> bool:
    """Whether a mask hides exactly the keys behind each query."""
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2] or mask.numel() != mask.shape[-1] ** 2:
        return False
    mask = mask.reshape(mask.shape[-2:])
    if mask.dtype is torch.bool:
        visible = ~mask if kind == "drop" else mask
    else:
        mask = -mask if kind == "subtract" else mask
        visible = mask == 0
        if not bool((mask[~visible] <= HIDDEN).all()):
            return False
    return torch.equal(visible, torch.ones_like(visible).tril())


PATTERN = Attention()
