"""Attention's Triton kernels, interpreted, on small odd shapes, mostly in small tiles so that there are several.

float16 stands for all 16-bit types: Triton's interpreter has no products of bfloat16.
"""

import pytest
import torch
from numerics import compare, fakes, strided, wide

from rewriter.kernels import attention as kernel
from rewriter.kernels.attention import attention
from rewriter.kernels.common import use_triton

Q, K = (1, 2, 37, 20), (1, 1, 45, 20)
OPTIONS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "softcap and sink": dict(softcap=2.0, scale=0.7, sink=True),
    "sinks of queries": dict(sink=Q[:3]),
    "multiplier": dict(multiplier=(1, 1, 37, 45), sink=(1, 1, 37)),
    "multiplier and softcap": dict(multiplier=(37, 1), softcap=2.0, is_causal=True, bias=(1, 2, 37, 45)),
    "keep": dict(keep=True, dropout=0.3),
    "bias": dict(bias=(1, 2, 37, 45)),
    "visible": dict(bias=(1, 1, 37, 45), visible=True, is_causal=True),
    "all": dict(is_causal=True, softcap=2.0, sink=True, keep=True, dropout=0.3, bias=(1, 1, 37, 45)),
    "all but the bias": dict(is_causal=True, softcap=2.0, sink=True, keep=True, dropout=0.3),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that differ from kernel to kernel, so that each meets the diagonal in its own way."""
    tiles = (((16, 16, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1)),) * 2
    for table in ("TILES", "TILES_OF_FLOAT32"):
        monkeypatch.setattr(kernel, table, dict.fromkeys((64, 128, 256), tiles))


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
    return (lambda *t, f=f: f(*t[:3], **dict(zip(names, t[3:], strict=True)), **options) for f in (attention, dense))


def case(
    q=Q, k=K, v_width=12, dtype=torch.float32, bias=None, visible=False, sink=False, keep=False, multiplier=None,
    **options
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


def check(**options):
    names, inputs, options = case(**options)
    compare(*both(names, **options), inputs)


def test_triton_is_what_runs(monkeypatch):
    assert use_triton(torch.zeros(1))
    monkeypatch.delattr(kernel, "_scores")  # of the reference
    attention(*(t.detach() for t in case()[1]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_numbers(options, small_tiles):
    check(**options)


@pytest.mark.parametrize("name", ["softcap and sink", "all"])
def test_numbers_in_16_bits(name, small_tiles):
    check(dtype=torch.float16, **OPTIONS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_real_tiles(dtype):
    """More than one tile of those that a GPU would take."""
    check(q=(1, 2, 150, 40), k=(1, 2, 140, 40), v_width=80, dtype=dtype, is_causal=True, softcap=2.0)


def test_wide_heads():
    check(q=(1, 1, 9, 200), k=(1, 1, 17, 200), v_width=136, dtype=torch.float16)


@pytest.mark.parametrize(
    "dtype, width", [(torch.float64, 20), (torch.float16, 257), (torch.bfloat16, 20), (torch.float32, 129)]
)
def test_what_the_reference_does(dtype, width):
    check(q=(1, 2, 9, width), k=(1, 1, 11, width), dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 2, 37, 45), (2, 1, 45), (37, 1), (1, 1, 1, 45)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_what_is_broadcast(shape, is_causal, small_tiles):
    check(bias=shape, sink=True, is_causal=is_causal)  # without a sink a bias that is equal over keys changes nothing


@pytest.mark.parametrize("shape", [(37, 45), (1, 2, 1, 45)])
def test_what_is_visible_is_broadcast(shape, small_tiles):
    check(bias=shape, visible=True)


@pytest.mark.parametrize(
    "q, k", [((1, 4, 5, 8), (1, 2, 40, 8)), ((1, 4, 40, 8), (1, 2, 5, 8)), ((2, 4, 7, 1), (2, 2, 1, 1))]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_shapes(q, k, is_causal, small_tiles):
    check(q=q, k=k, v_width=3, is_causal=is_causal, sink=True)  # without a sink the gradient of one key is rounding


@pytest.mark.parametrize(
    "q, k", [((0, 2, 5, 8), (0, 2, 5, 8)), ((1, 2, 0, 8), (1, 2, 5, 8)), ((1, 2, 5, 8), (1, 2, 0, 8))]
)
def test_nothing(q, k):
    check(q=q, k=k, sink=True)


def test_lengths_of_16(small_tiles):
    """A multiple of 16 keys, which kernels with a bias are told."""
    q, k = (1, 2, 32, 16), (1, 2, 48, 16)
    check(q=q, k=k, v_width=16, bias=(1, 2, 32, 48), keep=True, dropout=0.3)
    check(q=q, k=k, v_width=16, bias=(32, 48), visible=True, is_causal=True)


@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
def test_layouts(kind, small_tiles):
    shapes = [(2, 2, 17, 8), (2, 1, 19, 8), (2, 1, 19, 8), (2, 2, 17, 19)]
    for order in [(0, 2, 1, 3), (0, 1, 3, 2)]:
        moved = [strided(*shape, order=order, seed=i) for i, shape in enumerate(shapes)]
        compare(*both(["bias"], softcap=2.0), moved, kind=kind)
    packed = strided(2, 17, 3 * 2 * 8, grad=False).split(16, -1)
    parts = [t.view(2, 17, 2, 8).transpose(1, 2).requires_grad_() for t in packed]
    compare(*both([], is_causal=True), parts, kind=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_finite_fills(dtype, small_tiles):
    """Rows in which finfo.min hides all keys or all but some; tiles that are all -inf, first or last."""
    names, (q, k, v, bias), _ = case(dtype=dtype, bias=Q[:3] + K[2:3])
    with torch.no_grad():
        bias[:, 0, 2:5] = torch.finfo(dtype).min
        bias[:, 0, :, 3:7] = torch.finfo(dtype).min
        bias[:, 1, :, :34] = -torch.inf
        bias[:, 1, 20:] = 0.0
        bias[:, 1, 20:, 2:] = -torch.inf
    compare(*both(names), [q, k, v, bias])
    if dtype is torch.float32:
        visible = bias.detach() > -1e30
        visible[:, 0, :, :2] = True
        compare(*both(names), [q, k, v, visible])


def test_a_query_that_sees_nothing(small_tiles):
    names, inputs, _ = case(bias=(1, 1, 37, 45), visible=True, sink=True)
    inputs[3][0, 0, 5] = False
    compare(*both(names), inputs)  # with a sink: zeros
    expected = torch.zeros(1, 2, 37, dtype=torch.bool)
    expected[:, :, 5] = True
    floats = torch.zeros(1, 1, 37, 45).masked_fill(~inputs[3], -torch.inf)
    for bias in (inputs[3], floats):
        assert torch.equal(attention(*inputs[:3], bias=bias).isnan().all(-1), expected)


def test_each_gradient_alone(small_tiles):
    names, inputs, options = case(q=(1, 2, 17, 8), k=(1, 1, 19, 8), bias=(2, 17, 19), sink=True)
    new, old = both(names, softcap=2.0)
    for i in range(len(inputs)):
        compare(new, old, [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)])


def test_dtypes_that_differ(small_tiles):
    q, k, v, bias, sink = case(q=(1, 2, 17, 8), k=(1, 1, 19, 8), bias=(2, 17, 19), sink=True)[1]
    mixed = attention(q.half(), k.half(), v, bias=bias.to(torch.float16), sink=sink)
    expected = attention(q.half().float(), k.half().float(), v, bias=bias.half().float(), sink=sink)
    assert mixed.dtype is torch.float32
    torch.testing.assert_close(mixed, expected)
    for a, b in zip(
        torch.autograd.grad(mixed.square().sum(), (q, k, v, bias, sink)),
        torch.autograd.grad(expected.square().sum(), (q, k, v, bias, sink)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_layouts_are_those_of_the_fake_operator():
    new, _ = both(["bias", "sink"], is_causal=True)
    fakes(
        new,
        lambda n: [
            strided(2, 4, n, 8, order=(0, 2, 1, 3)), strided(2, 2, n, 8, order=(0, 2, 1, 3)),
            strided(2, 2, n, 8, order=(0, 1, 3, 2)), strided(1, 4, n, n), strided(4),
        ],
    )  # fmt: skip
