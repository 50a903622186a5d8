"""Attention's reference operator against a dense formula, in eager PyTorch and in float64."""

import pytest
import torch
import torch.nn.functional as F
from numerics import BEHAVIOURS, compare, strided, wide

from rewriter.kernels import attention as kernel
from rewriter.kernels.attention import attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "softcap": dict(softcap=2.0, scale=0.7),
    "sink": dict(sink=True),
    "sinks of queries": dict(sink=(2, 4, 13)),
    "sink of all": dict(sink=(1, 1, 1)),
    "multiplier": dict(multiplier=(2, 1, 13, 19)),
    "multiplier and softcap": dict(multiplier=(13, 1), softcap=2.0, is_causal=True, bias=(2, 4, 13, 19)),
    "keep": dict(keep=True, dropout=0.3),
    "keep without dropout": dict(keep=True),
    "bias": dict(bias=(2, 4, 13, 19)),
    "visible": dict(bias=(2, 1, 13, 19), visible=True),
    "all": dict(is_causal=True, softcap=2.0, sink=True, keep=True, dropout=0.3, bias=(1, 4, 13, 19)),
    "all but the bias": dict(is_causal=True, softcap=2.0, sink=True, keep=True, dropout=0.3),
}


def dense(
    q, k, v, bias=None, sink=None, keep=None, multiplier=None, dropout=0.0, scale=None, softcap=None, is_causal=False,
    out_dtype=None,
):  # fmt: skip
    """As models write it: scores in the dtype of q, softmax in float32, probabilities in the dtype of v."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if multiplier is None else s * multiplier.to(s.dtype)
    if bias is not None:
        s = s.masked_fill(~bias, -torch.inf) if bias.dtype is torch.bool else s + bias
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if sink is not None:
        sink = sink.unsqueeze(-1) if sink.dim() == 1 else sink
        s = torch.cat((s, sink.to(s.dtype).unsqueeze(-1).expand(*s.shape[:3], 1)), -1)
    p = wide(s).softmax(-1)[..., : k.shape[2]]
    p = p if keep is None else p * keep / (1 - dropout)
    return (p.to(v.dtype) @ v).to(out_dtype or q.dtype)


def both(names, **options):
    """The operator and the formula as functions of q, k, v and the tensors named."""
    return (lambda *t, f=f: f(*t[:3], **dict(zip(names, t[3:], strict=True)), **options) for f in (attention, dense))


def case(
    q=(2, 4, 13, 10), k=(2, 2, 19, 10), v_width=6, dtype=torch.float32, bias=None, visible=False, sink=False,
    keep=False, multiplier=None, **options
):  # fmt: skip
    """(names of the optional tensors, inputs, options) of a case of OPTIONS."""
    inputs = [strided(*q, dtype=dtype), strided(*k, dtype=dtype, seed=2)]
    inputs.append(strided(*k[:3], v_width, dtype=dtype, seed=3))
    extra = {}
    if visible:
        extra["bias"] = strided(*bias, grad=False, seed=4) > -0.5
        extra["bias"][..., 0] = True
    elif bias is not None:
        extra["bias"] = strided(*bias, dtype=dtype, seed=4)
    if sink:
        extra["sink"] = strided(*((q[1],) if sink is True else sink), dtype=dtype, seed=5)
    if keep:
        extra["keep"] = strided(*q[:3], k[2], grad=False, seed=6) > -0.5
    if multiplier is not None:
        extra["multiplier"] = strided(*multiplier, dtype=dtype, grad=False, seed=7)
    return list(extra), [*inputs, *extra.values()], options


def check(compare_options=None, **options):
    names, inputs, options = case(**options)
    compare(*both(names, **options), inputs, **(compare_options or {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_numbers(dtype, options):
    check(dtype=dtype, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_of_queries(options, monkeypatch):
    monkeypatch.setattr(kernel, "SCORES", 2 * 4 * 19 * 5)
    check(**options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("visible", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 4, 13, 19), (2, 1, 13, 19), (1, 4, 13, 19), (13, 19), (4, 13, 1), (2, 1, 1, 19), (19,), (1,), ()]
)
def test_what_is_broadcast(shape, visible, is_causal, monkeypatch):
    monkeypatch.setattr(kernel, "SCORES", 2 * 4 * 19 * 5)
    if visible and (not shape or shape[-1] == 1):
        shape = (2, 1, 13, 19)
    check(
        bias=shape, visible=visible, is_causal=is_causal, sink=True
    )  # without, a bias equal over keys changes nothing


@pytest.mark.parametrize(
    "q", [(2, 4, 13, 10), (2, 4, 31, 10), (1, 4, 1, 10), (2, 4, 1, 10), (0, 4, 3, 10), (2, 4, 0, 10)]
)
@pytest.mark.parametrize("k", [(2, 4, 19, 10), (2, 1, 19, 10), (2, 2, 1, 10), (2, 2, 0, 10)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "sink": True}])
def test_shapes(q, k, options):
    check(q=q, k=(q[0], *k[1:]), **options)


@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_layouts(kind):
    """Views of [B, T, H, D]; slices of a packed projection; a last dimension that is not contiguous; expanded heads."""
    names, (q, k, v, bias), options = case(bias=(2, 4, 13, 19))
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
    names, (q, k, v, bias), _ = case(dtype=dtype, bias=(2, 1, 13, 19))
    with torch.no_grad():
        bias[0, :, 2:5] = torch.finfo(dtype).min
        bias[1, :, :, 3:] = torch.finfo(dtype).min
        bias[1, :, 7, 1:] = -torch.inf
    compare(*both(names, is_causal=is_causal), [q, k, v, bias])


def test_a_query_that_sees_nothing():
    names, inputs, _ = case(bias=(2, 1, 13, 19), visible=True, sink=True)
    inputs[3][1, 0, 5] = False
    compare(*both(names), inputs)  # with a sink: zeros
    assert attention(*inputs[:3], bias=inputs[3], sink=inputs[4])[1, :, 5].eq(0).all()
    expected = torch.zeros(2, 4, 13, dtype=torch.bool)
    expected[1, :, 5] = True
    floats = torch.zeros(2, 1, 13, 19).masked_fill(~inputs[3], -torch.inf)
    for bias in (inputs[3], floats):
        assert torch.equal(attention(*inputs[:3], bias=bias).isnan().all(-1), expected)


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
    names, inputs, _ = case(dtype=torch.bfloat16, bias=(1, 1, 13, 19), sink=True)
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
    keep = strided(2, 4, n, n + 1, grad=False, seed=6) > -0.5
    return [q, k, v, strided(1, 4, n, n + 1, seed=4), strided(4, seed=5), keep]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour(behaviour):
    new, _ = both(["bias", "sink", "keep"], dropout=0.3, softcap=2.0, is_causal=True)
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
    q, k, v, bias, sink, keep = (t.detach() for t in build(5))
    options = (0.3, None, 2.0, True)
    for extra in ((bias, sink[:, None], keep, bias), (bias > -9, None, None, None)):
        torch.library.opcheck(ops.attention_forward, (q, k, v, *extra, *options, torch.float32))
        out, stats = ops.attention_forward(q, k, v, *extra, *options, torch.float32)
        needs = (True, False, True, extra[1] is not None, extra[1] is not None)
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
        (dict(bias=torch.zeros(13, 19, dtype=torch.int64)), "floats or booleans"),
        (dict(sink=torch.zeros(3)), "sink"),
        (dict(sink=torch.zeros(2, 4, 12)), "sink"),
        (dict(multiplier=torch.zeros(2, 1, 13, 18)), "multiplier"),
        (dict(multiplier=torch.zeros(13, 19, requires_grad=True)), "multiplier"),
        (dict(keep=torch.zeros(2, 1, 13, 19, dtype=torch.bool)), "keep"),
        (dict(keep=torch.zeros(2, 4, 13, 19)), "keep"),
        (dict(dropout=0.1), "dropout"),
        (dict(dropout=1.1, keep=torch.zeros(2, 4, 13, 19, dtype=torch.bool)), "dropout"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    q, k, v = (t.detach() for t in case()[1])
    with pytest.raises(ValueError, match=message):
        attention(**(dict(q=q, k=k, v=v) | changes))
