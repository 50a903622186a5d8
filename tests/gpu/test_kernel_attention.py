"""Attention's Triton kernels on a GPU."""

from functools import partial

import attention_cases
import pytest
import torch
from attention_cases import FILLS, FLOORS, OPTIONS, PROPERTIES, both
from numerics import BEHAVIOURS, compare, compiles_inductor, run, strided

from rewriter.kernels.attention import attention

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = dict(q=(2, 4, 300, 64), k=(2, 2, 333, 64), v_width=64)
WHERE = dict(device="cuda", order=(0, 2, 1, 3), dtype=torch.bfloat16)  # views of [B, T, H, D]
case, check = (partial(f, **SHAPES, **WHERE) for f in (attention_cases.case, attention_cases.check))
tensor = partial(strided, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_numbers(dtype, options):
    check(dtype=dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", FILLS.values(), ids=FILLS)
def test_fills(dtype, options):
    check(dtype=dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", FLOORS.values(), ids=FLOORS)
def test_floors(dtype, options):
    check(dtype=dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("must_hold", PROPERTIES)
def test_what_must_hold(must_hold, dtype):
    must_hold(partial(case, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width, v_width", [(8, 16), (32, 80), (80, 128), (96, 96), (128, 128), (200, 136), (256, 256)])
def test_widths(dtype, width, v_width):
    """float32 beyond 128 is the reference's."""
    options = dict(q=(2, 4, 300, width), k=(2, 2, 333, width), v_width=v_width, dtype=dtype)
    check(**options, is_causal=True, softcap=2.0, sink="h")
    check(**options, visible="b1qk")
    check(**options, visible="b1qk", fill=-10.0, fill_first=True, bias="11qk")
    check(**options, floor=-0.5, bias="bhqk")


@pytest.mark.parametrize("options", [dict(softcap=50.0), dict(sink="h"), dict(softcap=50.0, sink="h")])
@pytest.mark.parametrize("groups", [1, 2])
def test_real_sizes(options, groups):
    check(q=(1, 2, 2048, 128), k=(1, groups, 2048, 128), v_width=128, is_causal=True, **options)


@pytest.mark.parametrize(
    "queries, keys", [(1, 1), (1, 1000), (1000, 1), (17, 1000), (1000, 17), (512, 512), (0, 5), (5, 0)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(queries, keys, is_causal):
    check(q=(2, 4, queries, 64), k=(2, 1, keys, 64), is_causal=is_causal, sink="h")
    check(q=(2, 4, queries, 64), k=(2, 1, keys, 64), is_causal=is_causal, visible="b1qk", fill=-1.0, sink="h")


SHAPES_OVER_SCORES = ["bhqk", "b1qk", "1hqk", "qk", "hq1", "b11k"]


@pytest.mark.parametrize("shape", SHAPES_OVER_SCORES)
def test_a_bias_is_broadcast(shape):
    check(bias=shape, sink="h", dtype=torch.float32)
    check(bias=shape, sink="h", is_causal=True)


@pytest.mark.parametrize("options", [dict(fill_first=False), dict(fill_first=True), dict(floor=-0.5)])
@pytest.mark.parametrize("shape", SHAPES_OVER_SCORES)
def test_a_bias_beside_a_fill_is_broadcast(shape, options):
    check(bias=shape, visible="b1qk", fill=-1.0, sink="h", dtype=torch.float32, **options)
    check(bias=shape, visible="b1qk", fill=-1.0, sink="h", is_causal=True, **options)


@pytest.mark.parametrize("fill", [-torch.inf, -1.0])
@pytest.mark.parametrize("shape", SHAPES_OVER_SCORES)
def test_what_is_visible_is_broadcast(shape, fill):
    if fill == -1.0 or shape.endswith("k"):
        check(visible=shape, fill=fill, sink="h", dtype=torch.float32)
        check(visible=shape, fill=fill, sink="h", is_causal=True)


@pytest.mark.parametrize("shape", SHAPES_OVER_SCORES)
def test_what_is_kept_is_broadcast(shape):
    check(keep=shape, dropout=0.3, dtype=torch.float32)
    check(keep=shape, dropout=0.3, is_causal=True)


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
    names, (q, k, v, bias), _ = case(dtype=dtype, bias="bhqk")
    with torch.no_grad():
        bias[:, 0, 2:5] = torch.finfo(dtype).min
        bias[:, 1, :, 3:200] = torch.finfo(dtype).min
        bias[:, 2, :, :300] = -torch.inf
        bias[:, 3, :, 2:] = -torch.inf
    compare(*both(names), [q, k, v, bias])


@pytest.mark.parametrize("options", [dict(softcap=50.0), dict(visible="11qk", fill=-10.0, floor=-11.0)])
def test_bit_equal_on_repeat(options):
    shapes = dict(q=(2, 8, 2048, 128), k=(2, 2, 2048, 128), v_width=128)
    names, inputs, options = case(**shapes, sink="h", bias="qk", is_causal=True, **options)
    new, _ = both(names, **options)
    first, *others = (run(new, inputs) for _ in range(4))
    for other in others:
        for a, b in zip((*first[0], *first[1]), (*other[0], *other[1]), strict=True):
            assert torch.equal(a, b)


def test_offsets_pass_32_bits():
    """A mask of more than 2^31 elements, of which the last rows are looked at; q, too, is spread that far in memory."""
    queries, keys = 70000, 32768
    visible = torch.zeros(1, 1, queries, keys, dtype=torch.bool, device="cuda")
    visible[..., :128] = True
    visible[..., -64:, -128:] = True
    memory = torch.zeros(queries, 32768, dtype=torch.bfloat16, device="cuda")
    q = memory[:, -64:].view(1, 1, queries, 64)
    q[:, :, -64:] = tensor(1, 1, 64, 64, dtype=torch.bfloat16, grad=False)
    k, v = (tensor(1, 1, keys, 64, dtype=torch.bfloat16, seed=i) for i in (2, 3))
    tail = q[:, :, -64:].clone()
    out = attention(q, k, v, visible=visible)[:, :, -64:]
    expected = attention(tail, k, v, visible=visible[:, :, -64:].clone())
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
    keep, visible = (tensor(2, 4, n, n + 1, grad=False, seed=i) > -0.5 for i in (6, 7))
    return [q, k, v, tensor(1, 4, n, n + 1, seed=4), tensor(4, seed=5), keep, visible[:, :1]]


@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour(behaviour):
    new, _ = both(["bias", "sink", "keep"], dropout=0.3, softcap=2.0, is_causal=True)
    behaviour(new, lambda n: build(n)[:6])


@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
@pytest.mark.parametrize("fill_first", [False, True])
def test_behaviour_of_fills(behaviour, fill_first):
    new, _ = both(["bias", "sink", "keep", "visible"], fill=-1.0, fill_first=fill_first, floor=-1.5)
    behaviour(new, build)


@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour_of_the_plain_one(behaviour):
    behaviour(lambda q, k, v: attention(q, k, v, is_causal=True), lambda n: build(n)[:3])
