"""Attention's Triton kernels, interpreted, on small odd shapes, mostly in small tiles so that there are several.

float16 stands for all 16-bit types: Triton's interpreter has no products of bfloat16.
"""

from functools import partial

import attention_cases
import pytest
import torch
from attention_cases import FILLS, FLOORS, OPTIONS, PROPERTIES, both
from numerics import compare, fakes, strided

from rewriter.kernels import attention_reference, attention_triton
from rewriter.kernels.attention import attention
from rewriter.kernels.common import use_triton

SHAPES = dict(q=(1, 2, 37, 20), k=(1, 1, 45, 20), v_width=12)
case, check = partial(attention_cases.case, **SHAPES), partial(attention_cases.check, **SHAPES)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that differ from kernel to kernel, so that each meets the diagonal in its own way."""
    tiles = (((16, 16, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1)),) * 2
    for table in ("TILES", "TILES_OF_FLOAT32"):
        monkeypatch.setattr(attention_triton, table, dict.fromkeys((64, 128, 256), tiles))


def test_triton_is_what_runs(monkeypatch):
    assert use_triton(torch.zeros(1))
    monkeypatch.delattr(attention_reference, "_scores")
    attention(*(t.detach() for t in case()[1]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_numbers(options, small_tiles):
    check(**options)


# On a CPU and a GPU all of FILLS run; the number itself matters to few lines of the kernels.
SOME_FILLS = ["-3.4e+38", "-3.4e+38, bias", "0.5 before the bias", "-10, all", "0.5 before the bias, all"]


@pytest.mark.parametrize("name", SOME_FILLS)
def test_fills(name, small_tiles):
    check(**FILLS[name])


@pytest.mark.parametrize("options", FLOORS.values(), ids=FLOORS)
def test_floors(options, small_tiles):
    check(**options)


@pytest.mark.parametrize(
    "options", [OPTIONS["softcap and sink"], OPTIONS["all"], FILLS["-10 before the bias, all"], FLOORS["all"]]
)
def test_numbers_in_16_bits(options, small_tiles):
    check(dtype=torch.float16, **options)


@pytest.mark.parametrize("must_hold", PROPERTIES)
def test_what_must_hold(must_hold, small_tiles):
    must_hold(partial(attention_cases.case, q=(1, 2, 20, 8), k=(1, 1, 35, 8), v_width=8))


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


@pytest.mark.parametrize("shape", ["bhqk", "h1k", "q1", "b11k"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_bias_is_broadcast(shape, is_causal, small_tiles):
    check(bias=shape, sink="h", is_causal=is_causal)  # without a sink a bias that is equal over keys changes nothing


@pytest.mark.parametrize("options", [dict(fill_first=False), dict(fill_first=True), dict(floor=-0.5)])
@pytest.mark.parametrize("shape", ["11qk", "h1k", "q1", "b11k"])
def test_a_bias_beside_a_fill_is_broadcast(shape, options, small_tiles):
    check(bias=shape, visible="b1qk", fill=-1.0, sink="h", **options)


@pytest.mark.parametrize("fill", [-torch.inf, -1.0])
@pytest.mark.parametrize("shape", ["bhqk", "qk", "bh1k", "q1"])
def test_what_is_visible_is_broadcast(shape, fill, small_tiles):
    if fill == -1.0 or shape.endswith("k"):
        check(visible=shape, fill=fill)


@pytest.mark.parametrize("shape", ["b1qk", "qk", "h1k", "q1"])
def test_what_is_kept_is_broadcast(shape, small_tiles):
    check(keep=shape, dropout=0.3, is_causal=True)


@pytest.mark.parametrize(
    "q, k", [((1, 4, 5, 8), (1, 2, 40, 8)), ((1, 4, 40, 8), (1, 2, 5, 8)), ((2, 4, 7, 1), (2, 2, 1, 1))]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_shapes(q, k, is_causal, small_tiles):
    check(q=q, k=k, v_width=3, is_causal=is_causal, sink="h")  # without a sink the gradient of one key is rounding


@pytest.mark.parametrize(
    "q, k", [((0, 2, 5, 8), (0, 2, 5, 8)), ((1, 2, 0, 8), (1, 2, 5, 8)), ((1, 2, 5, 8), (1, 2, 0, 8))]
)
def test_nothing(q, k):
    check(q=q, k=k, sink="h")
    check(q=q, k=k, visible="b1qk", fill=-1.0)


def test_lengths_of_16(small_tiles):
    """A multiple of 16 keys, which kernels with a bias are told."""
    q, k = (1, 2, 32, 16), (1, 2, 48, 16)
    check(q=q, k=k, v_width=16, bias="bhqk", keep="bhqk", dropout=0.3)
    check(q=q, k=k, v_width=16, visible="qk", is_causal=True)
    check(q=q, k=k, v_width=16, visible="qk", fill=-1.0, floor=-1.5, keep="h1k")


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
    names, (q, k, v, bias), _ = case(dtype=dtype, bias="bhqk")
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
        compare(*both(["visible"]), [q, k, v, visible])


@pytest.mark.parametrize("fill", [{}, dict(visible="qk", fill=-1.0, fill_first=True, floor=-1.5)])
def test_each_gradient_alone(fill, small_tiles):
    names, inputs, options = case(q=(1, 2, 17, 8), k=(1, 1, 19, 8), bias="hqk", sink="h", softcap=2.0, **fill)
    new, old = both(names, **options)
    for i, wanted in enumerate(inputs):
        if wanted.requires_grad:
            alone = [t.detach().requires_grad_() if i == j else t.detach() for j, t in enumerate(inputs)]
            compare(new, old, alone)


def test_dtypes_that_differ(small_tiles):
    q, k, v, bias, sink = case(q=(1, 2, 17, 8), k=(1, 1, 19, 8), bias="hqk", sink="h")[1]
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


@pytest.mark.parametrize("options", [dict(is_causal=True), dict(fill=-1.0, fill_first=True)])
def test_layouts_are_those_of_the_fake_operator(options):
    new, _ = both(["bias", "visible", "sink"], **options)
    fakes(
        new,
        lambda n: [
            strided(2, 4, n, 8, order=(0, 2, 1, 3)), strided(2, 2, n, 8, order=(0, 2, 1, 3)),
            strided(2, 2, n, 8, order=(0, 1, 3, 2)), strided(1, 4, n, n),
            torch.ones(n, n, dtype=torch.bool).tril(), strided(4),
        ],
    )  # fmt: skip
