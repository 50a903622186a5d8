"""Attention's Triton kernels on a GPU."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, compiles_inductor, run, strided, wide

from rewriter.kernels.attention import attention

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
OPTIONS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "softcap and sink": dict(softcap=2.0, scale=0.3, sink=True, is_causal=True),
    "sinks of queries and multiplier": dict(sink=(2, 4, 300), multiplier=(2, 1, 300, 333)),
    "keep": dict(keep=True, dropout=0.3),
    "bias": dict(bias=(2, 4, 300, 333)),
    "visible": dict(bias=(2, 1, 300, 333), visible=True),
    "all": dict(is_causal=True, softcap=2.0, sink=True, keep=True, dropout=0.3, bias=(1, 1, 300, 333)),
}


def dense(
    q, k, v, bias=None, sink=None, keep=None, multiplier=None, dropout=0.0, scale=None, softcap=None, is_causal=False
):
    """As models write it: scores in the dtype of q, softmax in float32, probabilities in the dtype of v."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if multiplier is None else s * multiplier
    if bias is not None:
        s = s.masked_fill(~bias, -torch.inf) if bias.dtype is torch.bool else s + bias
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
    if sink is not None:
        sink = sink.unsqueeze(-1) if sink.dim() == 1 else sink
        s = torch.cat((s, sink.to(s.dtype).unsqueeze(-1).expand(*s.shape[:3], 1)), -1)
    p = wide(s).softmax(-1)[..., : k.shape[2]]
    p = p if keep is None else p * keep / (1 - dropout)
    return p.to(v.dtype) @ v


def tensor(*shape, **options):
    return strided(*shape, device="cuda", **options)


def both(names, **options):
    return (lambda *t, f=f: f(*t[:3], **dict(zip(names, t[3:], strict=True)), **options) for f in (attention, dense))


def case(
    q=(2, 4, 300, 64), k=(2, 2, 333, 64), v_width=64, dtype=torch.bfloat16, bias=None, visible=False, sink=False,
    keep=False, multiplier=None, **options
):  # fmt: skip
    """(names of the optional tensors, inputs, options) of a case of OPTIONS; q, k and v are views of [B, T, H, D]."""
    shapes = (q, k, (*k[:3], v_width))
    inputs = [tensor(*shape, order=(0, 2, 1, 3), dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    extra = {}
    if visible:
        extra["bias"] = tensor(*bias, grad=False, seed=4) > -0.5
        extra["bias"][..., 0] = True
    elif bias is not None:
        extra["bias"] = tensor(*bias, dtype=dtype, seed=4)
    if sink:
        extra["sink"] = tensor(*((q[1],) if sink is True else sink), dtype=dtype, seed=5)
    if keep:
        extra["keep"] = tensor(*q[:3], k[2], grad=False, seed=6) > -0.5
    if multiplier is not None:
        extra["multiplier"] = tensor(*multiplier, dtype=dtype, grad=False, seed=7)
    return list(extra), [*inputs, *extra.values()], options


def check(layout=True, **options):
    names, inputs, options = case(**options)
    compare(*both(names, **options), inputs, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_numbers(dtype, options):
    check(dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width, v_width", [(8, 16), (32, 80), (80, 128), (96, 96), (128, 128), (200, 136), (256, 256)])
def test_widths(dtype, width, v_width):
    """float32 beyond 128 is the reference's."""
    options = dict(q=(2, 4, 300, width), k=(2, 2, 333, width), v_width=v_width, dtype=dtype)
    check(**options, is_causal=True, softcap=2.0, sink=True)
    check(**options, bias=(2, 1, 300, 333), visible=True)


@pytest.mark.parametrize("options", [dict(softcap=50.0), dict(sink=True), dict(softcap=50.0, sink=True)])
@pytest.mark.parametrize("groups", [1, 2])
def test_real_sizes(options, groups):
    check(q=(1, 2, 2048, 128), k=(1, groups, 2048, 128), v_width=128, is_causal=True, **options)


@pytest.mark.parametrize(
    "queries, keys", [(1, 1), (1, 1000), (1000, 1), (17, 1000), (1000, 17), (512, 512), (0, 5), (5, 0)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(queries, keys, is_causal):
    check(q=(2, 4, queries, 64), k=(2, 1, keys, 64), is_causal=is_causal, sink=True)


@pytest.mark.parametrize(
    "shape", [(2, 4, 300, 333), (2, 1, 300, 333), (1, 4, 300, 333), (300, 333), (4, 300, 1), (2, 1, 1, 333)]
)
@pytest.mark.parametrize("visible", [False, True])
def test_what_is_broadcast(shape, visible):
    if not visible or shape[-1] > 1:
        check(bias=shape, visible=visible, sink=True, dtype=torch.float32)
        check(bias=shape, visible=visible, sink=True, is_causal=True)


@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_layouts(kind):
    shapes = [(2, 4, 300, 64), (2, 2, 333, 64), (2, 2, 333, 64), (2, 4, 300, 333)]
    for order in [(0, 1, 2, 3), (2, 0, 1, 3), (0, 1, 3, 2), (2, 3, 0, 1)]:
        moved = [tensor(*shape, order=order, dtype=torch.bfloat16, seed=i) for i, shape in enumerate(shapes)]
        compare(*both(["bias"], softcap=2.0), moved, kind=kind)
    packed = tensor(2, 300, 3 * 4 * 64, dtype=torch.bfloat16, grad=False).split(256, -1)
    parts = [t.view(2, 300, 4, 64).transpose(1, 2).requires_grad_() for t in packed]
    compare(*both([], is_causal=True), parts, kind=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_fills(dtype):
    """Rows in which finfo.min hides all keys or all but some; tiles that are all -inf, first or last."""
    names, (q, k, v, bias), _ = case(dtype=dtype, bias=(2, 4, 300, 333))
    with torch.no_grad():
        bias[:, 0, 2:5] = torch.finfo(dtype).min
        bias[:, 1, :, 3:200] = torch.finfo(dtype).min
        bias[:, 2, :, :300] = -torch.inf
        bias[:, 3, :, 2:] = -torch.inf
    compare(*both(names), [q, k, v, bias])


def test_a_query_that_sees_nothing():
    names, inputs, _ = case(bias=(2, 1, 300, 333), visible=True, sink=True)
    inputs[3][1, 0, 5] = False
    compare(*both(names), inputs)
    expected = torch.zeros(2, 4, 300, dtype=torch.bool, device="cuda")
    expected[1, :, 5] = True
    assert torch.equal(attention(*inputs[:3], bias=inputs[3]).isnan().all(-1), expected)


def test_bit_equal_on_repeat():
    names, inputs, _ = case(q=(2, 8, 2048, 128), k=(2, 2, 2048, 128), v_width=128, sink=True, bias=(2048, 2048))
    new, _ = both(names, softcap=50.0, is_causal=True)
    first, *others = (run(new, inputs) for _ in range(4))
    for other in others:
        for a, b in zip((*first[0], *first[1]), (*other[0], *other[1]), strict=True):
            assert torch.equal(a, b)


def test_offsets_pass_32_bits():
    """A bias of more than 2^31 elements, of which the last rows are looked at; q, too, is spread that far in memory."""
    queries, keys = 70000, 32768
    bias = torch.zeros(1, 1, queries, keys, dtype=torch.bool, device="cuda")
    bias[..., :128] = True
    bias[..., -64:, -128:] = True
    memory = torch.zeros(queries, 32768, dtype=torch.bfloat16, device="cuda")
    q = memory[:, -64:].view(1, 1, queries, 64)
    q[:, :, -64:] = tensor(1, 1, 64, 64, dtype=torch.bfloat16, grad=False)
    k, v = (tensor(1, 1, keys, 64, dtype=torch.bfloat16, seed=i) for i in (2, 3))
    tail = q[:, :, -64:].clone()
    out = attention(q, k, v, bias=bias)[:, :, -64:]
    expected = attention(tail, k, v, bias=bias[:, :, -64:].clone())
    assert torch.equal(out, expected)
    grads = [torch.autograd.grad(t.float().square().sum(), (k, v)) for t in (out, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_memory_is_linear():
    q, k, v = case(q=(1, 4, 16384, 64), k=(1, 1, 16384, 64))[1]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(q, k, v, is_causal=True, softcap=50.0).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 128 << 20  # the scores alone would be 4 GiB


def test_autocast_does_not_reach_inside():
    q, k, v = (t.detach().float() for t in case()[1])
    expected = attention(q, k, v, softcap=2.0)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v, softcap=2.0), expected)


def build(n):
    q = tensor(2, 4, n, 16, order=(0, 2, 1, 3))
    k, v = (tensor(2, 2, n + 1, 16, order=(0, 2, 1, 3), seed=i) for i in (2, 3))
    keep = tensor(2, 4, n, n + 1, grad=False, seed=6) > -0.5
    return [q, k, v, tensor(1, 4, n, n + 1, seed=4), tensor(4, seed=5), keep]


@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour(behaviour):
    new, _ = both(["bias", "sink", "keep"], dropout=0.3, softcap=2.0, is_causal=True)
    behaviour(new, build)


@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour_of_the_plain_one(behaviour):
    behaviour(lambda q, k, v: attention(q, k, v, is_causal=True), lambda n: build(n)[:3])
