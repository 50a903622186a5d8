"""Attention's reference operator against a dense formula, in eager PyTorch and in float64."""

from functools import partial

import attention_cases
import pytest
import torch
import torch.nn.functional as F
from attention_cases import FILLS, FLOORS, PROPERTIES, both
from numerics import BEHAVIOURS, compare, strided

from rewriter.kernels import attention_reference
from rewriter.kernels.attention import attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = attention_cases.OPTIONS | {
    "softcap": dict(softcap=2.0, scale=0.7),
    "sink": dict(sink="h"),
    "sink of all": dict(sink="111"),
    "multiplier alone": dict(multiplier="b1qk"),
    "keep without dropout": dict(keep="bhqk"),
}
SHAPES = dict(q=(2, 4, 13, 10), k=(2, 2, 19, 10), v_width=6)
case, check = partial(attention_cases.case, **SHAPES), partial(attention_cases.check, **SHAPES)


@pytest.fixture
def chunks(monkeypatch):
    """Five queries at a time."""
    monkeypatch.setattr(attention_reference, "SCORES", 2 * 4 * 19 * 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_numbers(dtype, options):
    check(dtype=dtype, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_of_queries(options, chunks):
    check(**options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", FILLS.values(), ids=FILLS)
def test_fills(dtype, options, chunks):
    check(dtype=dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", FLOORS.values(), ids=FLOORS)
def test_floors(dtype, options, chunks):
    check(dtype=dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("must_hold", PROPERTIES)
def test_what_must_hold(must_hold, dtype, chunks):
    must_hold(partial(case, dtype=dtype))


SHAPES_OVER_SCORES = ["bhqk", "b1qk", "1hqk", "qk", "hq1", "b11k", "k", "1", ""]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES_OVER_SCORES)
def test_a_bias_is_broadcast(shape, is_causal, chunks):
    check(bias=shape, is_causal=is_causal, sink="h")  # without, a bias equal over keys changes nothing


@pytest.mark.parametrize("options", [dict(fill_first=False), dict(fill_first=True), dict(floor=-0.5)])
@pytest.mark.parametrize("shape", SHAPES_OVER_SCORES)
def test_a_bias_beside_a_fill_is_broadcast(shape, options, chunks):
    check(bias=shape, visible="b1qk", fill=-1.0, sink="h", **options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("fill", [-torch.inf, -1.0])
@pytest.mark.parametrize("shape", SHAPES_OVER_SCORES)
def test_what_is_visible_is_broadcast(shape, fill, is_causal, chunks):
    if fill == -1.0 or shape.endswith("k"):
        check(visible=shape, fill=fill, is_causal=is_causal, sink="h")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES_OVER_SCORES)
def test_what_is_kept_is_broadcast(shape, is_causal, chunks):
    check(keep=shape, dropout=0.3, is_causal=is_causal)


@pytest.mark.parametrize(
    "q", [(2, 4, 13, 10), (2, 4, 31, 10), (1, 4, 1, 10), (2, 4, 1, 10), (0, 4, 3, 10), (2, 4, 0, 10)]
)
@pytest.mark.parametrize("k", [(2, 4, 19, 10), (2, 1, 19, 10), (2, 2, 1, 10), (2, 2, 0, 10)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "sink": "h"}, {"visible": "b1qk", "fill": -1.0}])
def test_shapes(q, k, options):
    check(q=q, k=(q[0], *k[1:]), **options)


@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_layouts(kind):
    """Views of [B, T, H, D]; slices of a packed projection; a last dimension that is not contiguous; expanded heads."""
    names, (q, k, v, bias), options = case(bias="bhqk")
    new, old = both(names, softcap=2.0)
    for order in [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)]:
        moved = [strided(*t.shape, order=order, seed=i) for i, t in enumerate((q, k, v, bias))]
        compare(new, old, moved, kind=kind)
    packed = strided(2, 13, 3 * 4 * 10, grad=False).split(40, -1)
    parts = [t.view(2, 13, 4, 10).transpose(1, 2).requires_grad_() for t in packed]
    compare(*both([], is_causal=True), parts, kind=kind)
    expanded = strided(2, 1, 19, 10, grad=False).expand(2, 4, 19, 10).requires_grad_()
    compare(*both([]), [q, expanded, expanded.detach().requires_grad_()], kind=kind)


def test_gradients_have_the_layout_of_what_they_belong_to():
    q, k, v = (strided(2, 4, 13, 8, order=(0, 2, 1, 3), seed=i) for i in range(3))
    out = attention(q, k, v)
    assert out.is_contiguous()
    for t, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert gradient.stride() == t.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("is_causal", [False, True])
def test_finite_fills(dtype, is_causal):
    """Rows in which finfo.min hides all keys, or all but one, beside rows that it leaves alone."""
    names, (q, k, v, bias), _ = case(dtype=dtype, bias="b1qk")
    with torch.no_grad():
        bias[0, :, 2:5] = torch.finfo(dtype).min
        bias[1, :, :, 3:] = torch.finfo(dtype).min
        bias[1, :, 7, 1:] = -torch.inf
    compare(*both(names, is_causal=is_causal), [q, k, v, bias])


def test_a_sink_of_minus_infinity_is_none():
    q, k, v = case()[1]
    torch.testing.assert_close(attention(q, k, v, sink=torch.full((4,), -torch.inf)), attention(q, k, v))


def test_all_dropped():
    q, k, v = case()[1]
    out = attention(q, k, v, keep=torch.zeros(2, 4, 13, 19, dtype=torch.bool), dropout=1.0)
    assert out.eq(0).all() and all(g.eq(0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_pytorchs_own(is_causal):
    q, k, v = case()[1]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, is_causal=is_causal), expected)


def test_dtypes_that_differ():
    q, k, v = case()[1]
    out = attention(q.to(torch.bfloat16), k.to(torch.bfloat16), v, sink=torch.zeros(4, dtype=torch.float16))
    assert out.dtype is torch.float32
    names, inputs, _ = case(dtype=torch.bfloat16)
    compare(*both(names, out_dtype=torch.float32), inputs, truth=list(both(names))[1])
    names, inputs, _ = case(dtype=torch.bfloat16, bias="11qk", sink="h")
    inputs[3:] = [t.detach().float().requires_grad_() for t in inputs[3:]]
    compare(*both(names, out_dtype=torch.bfloat16), inputs, truth=list(both(names))[1])


def test_autocast_leaves_the_computation_in_float32():
    names, inputs, options = case(**OPTIONS["all"])
    new, old = both(names, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = new(*inputs)
    torch.testing.assert_close(outs, old(*inputs))
    for gradient, expected in zip(
        torch.autograd.grad(outs.sum(), inputs[:3]), torch.autograd.grad(old(*inputs).sum(), inputs[:3]), strict=True
    ):
        torch.testing.assert_close(gradient, expected)


def build(n):
    q = strided(2, 4, n, 8, order=(0, 2, 1, 3))
    k, v = (strided(2, 2, n + 1, 8, order=(0, 2, 1, 3), seed=i) for i in (2, 3))
    keep, visible = (strided(2, 4, n, n + 1, grad=False, seed=i) > -0.5 for i in (6, 7))
    return [q, k, v, strided(1, 4, n, n + 1, seed=4), strided(4, seed=5), keep, visible[:, :1]]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour(behaviour):
    new, _ = both(["bias", "sink", "keep"], dropout=0.3, softcap=2.0, is_causal=True)
    behaviour(new, lambda n: build(n)[:6])


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("fill_first", [False, True])
def test_behaviour_of_fills(behaviour, fill_first):
    new, _ = both(["bias", "sink", "keep", "visible"], fill=-1.0, fill_first=fill_first, floor=-1.5)
    behaviour(new, build)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour_of_the_plain_one(behaviour):
    behaviour(lambda q, k, v: attention(q, k, v, is_causal=True), lambda n: build(n)[:3])


def test_double_backward_is_refused():
    q, k, v = case()[1]
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_operators_are_well_defined():
    ops = torch.ops.rewriter
    q, k, v, bias, sink, keep, visible = (t.detach() for t in build(5))
    visible[..., 0] = True
    fills = (-torch.inf, False, -torch.inf), (-1.0, True, -1.5)
    for extra in ((bias, visible, sink[:, None], keep, bias), (None, visible, None, keep[:1, :1], None), [None] * 5):
        for fill in fills:
            options = (0.3, None, 2.0, *fill, True)
            torch.library.opcheck(ops.attention_forward, (q, k, v, *extra, *options, torch.float32))
            out, stats = ops.attention_forward(q, k, v, *extra, *options, torch.float32)
            needs = (True, False, True, extra[0] is not None, extra[2] is not None)
            torch.library.opcheck(ops.attention_backward, (out, q, k, v, *extra, out, stats, *options, *needs))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=torch.zeros(4, 13, 10)), "4 dimensions"),
        (dict(k=torch.zeros(2, 2, 19, 9)), "must be"),
        (dict(v=torch.zeros(2, 2, 18, 10)), "must be"),
        (dict(q=torch.zeros(2, 3, 13, 10)), "multiple"),
        (dict(bias=torch.zeros(2, 1, 13, 18)), "broadcast"),
        (dict(bias=torch.zeros(1, 2, 4, 13, 19)), "broadcast"),
        (dict(bias=torch.zeros(13, 19, dtype=torch.int64)), "bias must be of floats"),
        (dict(bias=torch.ones(13, 19, dtype=torch.bool)), "bias must be of floats"),
        (dict(visible=torch.ones(13, 19)), "visible must be of booleans"),
        (dict(visible=torch.ones(13, 19, dtype=torch.int64)), "visible must be of booleans"),
        (dict(visible=torch.ones(2, 1, 13, 18, dtype=torch.bool)), "visible must broadcast"),
        (dict(sink=torch.zeros(3)), "sink"),
        (dict(sink=torch.zeros(2, 4, 12)), "sink"),
        (dict(multiplier=torch.zeros(2, 1, 13, 18)), "multiplier"),
        (dict(multiplier=torch.zeros(13, 19, requires_grad=True)), "multiplier"),
        (dict(keep=torch.zeros(2, 1, 13, 18, dtype=torch.bool)), "keep must broadcast"),
        (dict(keep=torch.zeros(2, 4, 13, 19)), "keep must be of booleans"),
        (dict(dropout=0.1), "dropout"),
        (dict(dropout=1.1, keep=torch.zeros(2, 4, 13, 19, dtype=torch.bool)), "dropout"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    q, k, v = (t.detach() for t in case()[1])
    with pytest.raises(ValueError, match=message):
        attention(**(dict(q=q, k=k, v=v) | changes))
