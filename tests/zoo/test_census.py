"""The census counts what it should in small modules written by hand."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo.census import KINDS, Row, census, compare

from rewriter.report import NearMiss, Rewrite, RewriteReport

WIDTH = 8


class Plain(nn.Module):
    """A forward written as a function of (module, x), with one weight and two linears."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(WIDTH))
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.function(self, x)


class EmptyNorm(nn.Identity):
    pass


def counted(model, x=None):
    torch.manual_seed(0)
    x = torch.randn(2, 5, WIDTH, requires_grad=True) if x is None else x
    return {kind: dict(counts) for kind, counts in census(model, {"x": x}).items() if counts}


def centred(x):
    return x - x.mean(-1, keepdim=True)


def scores(m, x):
    return m.a(x) @ m.b(x).transpose(-1, -2) / 3


def half_gelu(x):
    return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3))))


def angles(x):
    position, frequency = torch.arange(x.shape[1]).float(), torch.rand(WIDTH // 2)
    return position[:, None] * frequency


def turn(x):
    cos, sin = (torch.cat([f(angles(x))] * 2, -1)[None].to(x.dtype) for f in (torch.cos, torch.sin))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def turn_halves(x):
    cos, sin = angles(x).cos(), angles(x).sin()
    left, right = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def turn_complex(x):
    turns = torch.polar(torch.ones_like(angles(x)), angles(x))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


CASES = {
    "rms norm": (lambda m, x: m.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), "rms_norm", 1),
    "rms norm, square": (lambda m, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True)), "rms_norm", 1),
    "rms norm, quotient": (lambda m, x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6), "rms_norm", 1),
    "rms norm, library": (lambda m, x: F.rms_norm(x, (WIDTH,)), "rms_norm", 1),
    "l2 norm": (lambda m, x: x * torch.rsqrt((x * x).sum(-1, keepdim=True)), None, 0),
    "layer norm": (lambda m, x: F.layer_norm(x, (WIDTH,), m.weight), "layer_norm", 1),
    "layer norm, spelled out": (
        lambda m, x: centred(x) * torch.rsqrt(centred(x).pow(2).mean(-1, keepdim=True) + 1e-6), "layer_norm", 1,
    ),
    "layer norm, variance": (lambda m, x: centred(x) / torch.sqrt(x.var(-1, keepdim=True)), "layer_norm", 1),
    "silu": (lambda m, x: x * torch.sigmoid(x), None, 0),
    "quick gelu": (lambda m, x: x * torch.sigmoid(1.702 * x), None, 0),
    "tanh gelu": (lambda m, x: half_gelu(m.a(x)), None, 0),
    "glu": (lambda m, x: F.silu(m.a(x)) * m.b(x), "glu", 1),
    "glu, reversed": (lambda m, x: m.b(x) * F.gelu(m.a(x)).float(), "glu", 1),
    "glu, spelled out": (lambda m, x: half_gelu(m.a(x)) * m.b(x), "glu", 1),
    "glu, halves": (lambda m, x: (lambda g, u: (u + 1) * (g * torch.sigmoid(g)))(*m.a(x).chunk(2, -1)), "glu", 1),
    "gate of one column": (lambda m, x: torch.sigmoid(m.a(x)[..., :1]) * x, None, 0),
    "attention": (lambda m, x: scores(m, x).softmax(-1) @ x, "attention", 1),
    "attention, masked": (
        lambda m, x: F.dropout(F.softmax(scores(m, x) + torch.zeros(5, 5), -1, dtype=torch.float64).to(x.dtype)) @ x,
        "attention", 1,
    ),
    "attention, sinks": (
        lambda m, x: torch.cat([scores(m, x), torch.zeros(2, 5, 1)], -1).softmax(-1)[..., :-1] @ x, "attention", 1,
    ),
    "attention, library": (lambda m, x: F.scaled_dot_product_attention(x, x, x), "attention", 1),
    "router": (lambda m, x: m.a(x).softmax(-1) @ x.transpose(-1, -2), None, 0),
    "rotary": (lambda m, x: turn(m.a(x)), "rotary", 1),
    "rotary of two": (lambda m, x: turn(m.a(x)) + turn(m.b(x)), "rotary", 2),
    "rotary, halves": (lambda m, x: turn_halves(x), "rotary", 1),
    "rotary, complex": (lambda m, x: turn_complex(m.a(x)), "rotary", 1),
    "sine positions": (lambda m, x: x + torch.cat([angles(x).cos(), angles(x).sin()], -1), None, 0),
    "cross entropy": (lambda m, x: F.cross_entropy(x.flatten(0, 1), torch.zeros(10).long()), "loss", 1),
    "log softmax": (lambda m, x: x.log_softmax(-1).gather(-1, torch.zeros(2, 5, 1).long()), "loss", 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_counts_each_spelling_once(case):
    function, kind, times = CASES[case]
    assert counted(Plain(function)) == ({kind: {"": times}} if kind else {})


def test_it_names_the_innermost_module():
    inner = Plain(lambda m, x: F.silu(m.a(x)) * m.b(F.rms_norm(x, (WIDTH,))))
    model = Plain(lambda m, x: m.inner(m.inner(x)) + m.norm(x) + m.empty(x))
    model.inner, model.norm, model.empty = inner, nn.LayerNorm(WIDTH), EmptyNorm()
    expected = {
        "rms_norm": {"inner": 1}, "layer_norm": {"norm": 1}, "other_norm": {"empty": 1}, "glu": {"inner": 1},
    }  # fmt: skip
    assert counted(model) == expected


def test_a_block_that_runs_again_is_the_same_place():
    model = Plain(lambda m, x: m.blocks[0](m.blocks[0](x)))
    model.blocks = nn.ModuleList([Plain(lambda m, x: F.rms_norm(F.rms_norm(x, (WIDTH,)), (WIDTH,)))])
    assert counted(model) == {"rms_norm": {"blocks.0": 2}}


def test_a_loop_is_one_place():
    model = Plain(lambda m, x: [x := F.rms_norm(x, (WIDTH,)) for _ in range(3)][-1])
    assert counted(model) == {"rms_norm": {"": 1}}


def test_inference_does_not_count():
    model = Plain(lambda m, x: torch.no_grad()(F.rms_norm)(x, (WIDTH,)))
    assert counted(model) == {}


def test_the_model_keeps_no_hook():
    model = Plain(lambda m, x: m.a(x))
    counted(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def report(rewrites, near_misses=()):
    return RewriteReport(
        rewrites=tuple(Rewrite(p, tuple(sites), "op", details, 3, ()) for p, sites, details in rewrites),
        near_misses=tuple(NearMiss(p, (path,), reason, "node", "") for p, path, reason in near_misses),
        regions=(), graph_breaks=(), fallbacks=(), notes=(), environment={},
    )  # fmt: skip


def ran(**kinds):
    return {kind: Counter(kinds.get(kind, {})) for kind in KINDS}


def test_comparison_counts_rotated_tensors_and_several_sites_of_a_module():
    made = [
        ("rotary", ["a"], {"tensors": 2}),
        ("rms_norm", ["a", "a#2", "b"], {}),
        ("add_rms_norm", ["c"], {}),
        ("rms_norm", ["b"], {}),  # a second compilation of the same place
    ]
    rows = compare(ran(rotary={"a": 2}, rms_norm={"a": 2, "b": 1, "c": 1}), report(made))
    assert [(r.pattern, r.path, r.ran, r.found) for r in rows] == [
        ("rms_norm", "a", 2, 2), ("rms_norm", "b", 1, 1), ("rms_norm", "c", 1, 1), ("rotary", "a", 2, 2),
    ]  # fmt: skip


def test_comparison_gives_the_reasons_of_what_is_missing():
    rows = compare(ran(glu={"m": 1, "n": 1}), report([("glu", ["n"], {})], [("glu", "m", "why"), ("glu", "n", "x")]))
    assert rows == [Row("glu", "m", 1, 0, ("glu: why",)), Row("glu", "n", 1, 1, ())]


def test_comparison_takes_a_site_named_by_a_module_around_as_the_same_place():
    rows = compare(ran(loss={"": 1}), report([("linear_cross_entropy", ["lm_head"], {})]))
    assert rows == [Row("loss", "", 1, 1, ())]
    rows = compare(ran(glu={"a": 1}), report([("glu", ["b"], {})]))
    assert rows == [Row("glu", "a", 1, 0, ()), Row("glu", "b", 0, 1, ())]
