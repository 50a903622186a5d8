"""Every combination of linear cross entropy's options: loss and gradients by the float64 rule of numerics.py."""

import dataclasses
import itertools
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_near_truth, eager_linear_cross_entropy, upstream_like

from rewriter.kernels.linear_cross_entropy import linear_cross_entropy

SHAPES = ((2, 3), (1,), (7,), (3, 5), (0,), (0, 4), (1, 1), (33,), (2, 3, 2))
# name -> (shape of the leaf from that of the view, view of the leaf)
LAYOUTS = {
    "dense": (lambda s: s, lambda t: t),
    "columns apart": (lambda s: (*s[:-1], 2 * s[-1]), lambda t: t[..., ::2]),
    "rows of more": (lambda s: (s[0] + 3, *s[1:]), lambda t: t[2:-1]),
    "turned": (lambda s: (*s[:-2], s[-1], s[-2]), lambda t: t.transpose(-1, -2)),
    "shifted": (lambda s: (*s[:-2], s[-2] + 1, s[-1]), lambda t: t[..., :-1, :]),
    "expanded": (lambda s: (1, *s[1:]), None),
}
# Draws of the numbers of one case, judged together; more where that fails: the last bit of few numbers is luck, which
# many numbers don't have.
DRAWS = (2, 40)


@dataclass(frozen=True)
class Case:
    rows: tuple
    width: int
    classes: int
    dtype: torch.dtype
    x_layout: str
    weight_layout: str
    bias: bool
    adapter: tuple | None  # rank, dtype, layout of u
    trained: tuple  # x, weight, bias, u, up
    ignored: str
    target_dtype: torch.dtype
    upstream: str
    options: dict = field(default_factory=dict)


@st.composite
def cases(draw):
    def pick(*options):
        return draw(st.sampled_from(options))

    dtype = pick(torch.float32, torch.bfloat16, torch.float16)
    classes = pick(11, 2, 3, 37, 64)
    options = {
        "reduction": pick("mean", "sum", "none"),
        "ignore_index": pick(-100, 0, -1),
        "label_smoothing": pick(0.0, 0.1, 1.0),
        "scale": pick(1.0, 0.3, -1.5),
        "softcap": pick(None, 3.0),
        "z_loss": pick(0.0, 1e-2, 1.0),
        "class_weight": pick(None, torch.linspace(0.5, 2.0, classes), torch.arange(classes) % 2 + 0.0),
        "chunk_tokens": pick(None, 1, 4, 7),
        "matmul_dtype": pick(None, torch.bfloat16, torch.float16) if dtype is torch.float32 else None,
        "out_dtype": pick(None, torch.float32) if dtype.itemsize == 2 else None,
    }
    wide = pick(dtype, torch.float32)  # PEFT's adapters may be in float32 beside any head
    adapter = pick(3, 1, 8), options["matmul_dtype"] or wide, pick(*LAYOUTS)
    return Case(
        pick(*SHAPES), pick(8, 1, 3, 16), classes, dtype, pick(*LAYOUTS), pick(*list(LAYOUTS)[:-1]),
        pick(False, True), pick(None, adapter), pick(*itertools.product((True, False), repeat=5)),
        pick("some", "none", "all", "all but one"), pick(torch.int64, torch.int32),
        pick("dense", "expanded", "strided"), options,
    )  # fmt: skip


def leaf(shape, layout, dtype, grad, generator):
    """(a leaf, the function that makes the wanted view of it)"""
    base_shape, view = LAYOUTS[layout if len(shape) > 1 else "dense"]
    values = torch.randn(base_shape(shape), generator=generator, dtype=torch.float64).to(dtype)
    return values.requires_grad_(grad), view or (lambda t: t.expand(shape))


PARTS = ("x", "weight", "bias", "u", "up")


def parts(case):
    """name -> (shape, layout, dtype, whether it is trained) of each float tensor of a case."""
    found = {
        "x": ((*case.rows, case.width), case.x_layout, case.dtype),
        "weight": ((case.classes, case.width), case.weight_layout, case.dtype),
    }
    if case.bias:
        found["bias"] = (case.classes,), "dense", case.dtype
    if case.adapter is not None:
        rank, dtype, layout = case.adapter
        found["u"] = (*case.rows, rank), layout, dtype
        found["up"] = (case.classes, rank), case.weight_layout, dtype
    trained = dict(zip(PARTS, case.trained, strict=True))
    return {name: (*part, trained[name]) for name, part in found.items()}


def numbers(case, seed):
    """(leaves by name, the views of them, target) of one draw."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {name: leaf(*part, generator) for name, part in parts(case).items()}
    target = torch.randint(0, case.classes, case.rows, generator=generator)
    ignore, count = case.options["ignore_index"], target.numel()
    hit = torch.rand(count, generator=generator) < {"some": 0.4, "none": -1, "all": 2, "all but one": 2}[case.ignored]
    hit[: case.ignored == "all but one"] = False
    target.view(-1)[hit] = ignore
    return *({name: pair[i] for name, pair in pairs.items()} for i in (0, 1)), target.to(case.target_dtype)


def eager(x, weight, target, bias, *, matmul_dtype, **options):
    options["out_dtype"] = options["out_dtype"] or x.dtype
    with torch.autocast("cpu", matmul_dtype or torch.bfloat16, enabled=matmul_dtype is not None):
        return eager_linear_cross_entropy(x, weight, target.long(), bias, **options)


def run(function, case, leaves, views, target, upstream=None, again=False):
    """(loss, gradients), after a second backward through the same graph if `again`."""
    given = {name: view(leaves[name]) for name, view in views.items()}
    loss = function(given.pop("x"), given.pop("weight"), target, **{"bias": None, **given}, **case.options)
    wanted = [t for t in leaves.values() if t.requires_grad]
    assert loss.requires_grad == bool(wanted)
    if not wanted:
        return loss, ()
    upstream = upstream_like(loss, case.upstream) if upstream is None else upstream.to(loss.dtype)
    grads = torch.autograd.grad(loss, wanted, upstream, retain_graph=again)
    if again:
        kept = [g.clone() for g in grads]
        for g in grads:
            g.detach().fill_(float("nan"))  # whoever was given a gradient may write it
        for first, second in zip(kept, torch.autograd.grad(loss, wanted, upstream), strict=True):
            assert torch.equal(first, second)
        grads = kept
    return loss, grads


def check(case):
    few, many = DRAWS
    try:
        judge(case, few)
    except AssertionError:
        judge(case, many)


def judge(case, draws):
    outcomes = []
    for seed in range(draws):
        leaves, views, target = numbers(case, seed)
        before = [t.detach().clone() for t in leaves.values()]
        new = run(linear_cross_entropy, case, leaves, views, target, again=True)
        assert all(torch.equal(a, b) for a, b in zip(before, leaves.values(), strict=True)), "an input was written"
        keep, weight = target != case.options["ignore_index"], case.options["class_weight"]
        if not keep.any() or (weight is not None and not weight[target[keep].long()].sum()):
            # a mean of nothing is no number (infinite, with smoothing), and rows that are all ignored move nothing
            if case.options["reduction"] == "mean":
                assert not new[0].isfinite()
            elif not keep.any():
                assert not new[0].count_nonzero()
            assert keep.any() or not any(g.count_nonzero() for g in new[1])
            continue
        old = run(eager, case, leaves, views, target)
        exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in leaves.items()}
        wide = dataclasses.replace(case, options={**case.options, "matmul_dtype": None, "out_dtype": None})
        outcomes.append((new, old, run(eager, wide, exact, views, target, upstream_like(old[0], case.upstream))))
    if not outcomes:
        return
    floor = case.options["matmul_dtype"] or case.dtype
    names = ["loss", *(name for name, (*_, trained) in parts(case).items() if trained)]
    rows = [[[loss, *grads] for loss, grads in outcome] for outcome in outcomes]
    for i, name in enumerate(names):
        assert_near_truth(*(torch.cat([r[k][i].flatten() for r in rows]) for k in range(3)), name, floor)
        assert all(r[0][i].shape == r[1][i].shape for r in rows)


@settings(max_examples=1200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_every_combination(case):
    check(case)


def test_mean_in_float64():
    """Over three rows: the reciprocal of their number is none of few bits."""
    x, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5))
    target = torch.arange(3)
    new, old = (
        torch.autograd.grad(f(x, weight, target), (x, weight))
        for f in (linear_cross_entropy, eager_linear_cross_entropy)
    )
    for a, b in zip(new, old, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
