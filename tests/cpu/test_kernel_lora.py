"""Low-rank adapters' operator against eager PyTorch and float64."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, eager_lora, strided
from packed import random_packed, unpacked

from rewriter.kernels.lora import lora

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
          (torch.float16, torch.float32), (torch.float64, torch.float64)]  # fmt: skip


def inputs(rows=(3, 7), width=24, outs=(16, 8, 40), ranks=(4, 4, 4), dtypes=DTYPES[0], bias=True, z=False, seed=0):
    """x, z or not, then weights, biases or not, A and B."""
    frozen, adapter = dtypes
    rows = rows if isinstance(rows, tuple) else (2, rows)
    made = [strided(*rows, width, dtype=frozen, seed=seed)]
    made += [strided(*rows, width, dtype=adapter, seed=seed + 1)] if z else []
    made += [strided(n, width, dtype=frozen, grad=False, seed=seed + 2 + i) for i, n in enumerate(outs)]
    made += [strided(n, dtype=frozen, grad=i == 1, seed=seed + 20 + i) for i, n in enumerate(outs)] if bias else []
    made += [strided(r, width, dtype=adapter, seed=seed + 40 + i) for i, r in enumerate(ranks)]
    return made + [strided(n, r, dtype=adapter, seed=seed + 60 + i) for i, (n, r) in enumerate(zip(outs, ranks))]  # noqa: B905


def both(count=3, bias=True, z=False, scales=(2.0, 0.3, -1.0), **options):
    def call(function):
        def run(x, *rest):
            seen, rest = (rest[0], rest[1:]) if z else (None, rest)
            weights, rest = rest[:count], rest[count:]
            biases, rest = (rest[:count], rest[count:]) if bias else ([None] * count, rest)
            return function(x, weights, biases, rest[:count], rest[count:], scales[:count], z=seen, **options)

        return run

    return call(lora), call(eager_lora)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("z", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_numbers(dtypes, z, bias):
    options = {"out_dtype": dtypes[0]}
    compare(*both(bias=bias, z=z, **options), inputs(dtypes=dtypes, bias=bias, z=z))


def test_result_in_the_adapters_dtype():
    dtypes = (torch.bfloat16, torch.float32)
    compare(*both(), inputs(dtypes=dtypes), dtype=torch.bfloat16)


@pytest.mark.parametrize("ranks", [(1, 1, 1), (16, 16, 16), (3, 17, 8)])
def test_ranks(ranks):
    compare(*both(), inputs(ranks=ranks))


@pytest.mark.parametrize("count", [1, 2])
def test_fewer(count):
    compare(*both(count=count), inputs(outs=(16, 8)[:count], ranks=(4, 5)[:count]))


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1)])
def test_strided_input(order):
    made = inputs()
    made[0] = strided(3, 7, 24, order=order)
    compare(*both(), made)


def test_matmul_dtype_is_what_autocast_does():
    new, _ = both(matmul_dtype=torch.bfloat16)
    _, eager = both()

    def old(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return eager(*tensors)

    compare(new, old, inputs(), truth=eager, dtype=torch.bfloat16)


def in_4_bits(outs=(16, 8, 40), dtype=torch.float32):
    """(operator, eager) of x, A and B, with weights in 4 bits."""
    weights = [random_packed((n, 24), nested=n > 8, blocksize=8, dtype=dtype, seed=n) for n in outs]

    def new(x, *adapters):
        return lora(x, weights, [None] * 3, adapters[:3], adapters[3:], (2.0, 0.3, -1.0), out_dtype=dtype)

    def old(x, *adapters):
        exact = x.dtype is torch.float64
        matrices = [unpacked(w, x.dtype if exact else dtype) for w in weights]
        return eager_lora(x, matrices, [None] * 3, adapters[:3], adapters[3:], (2.0, 0.3, -1.0), out_dtype=dtype)

    return new, old


@pytest.mark.parametrize("dtypes", DTYPES[:4])
def test_weights_in_4_bits(dtypes):
    made = inputs(dtypes=dtypes, bias=False)
    compare(*in_4_bits(dtype=dtypes[0]), [made[0], *made[4:]])


def test_weights_in_4_bits_are_not_kept_unpacked():
    new, _ = in_4_bits((400, 8, 40))
    made, kept = inputs(outs=(400, 8, 40), bias=False), []
    torch._dynamo.reset()
    compiled = torch.compile(new, backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compiled(made[0], *made[4:])
    assert max(t.numel() for t in kept) <= 400 * 24 // 2


def test_no_rows():
    new, _ = both()
    made = inputs(rows=(0, 4))
    outs = new(*made)
    assert [o.shape for o in outs] == [(0, 4, 16), (0, 4, 8), (0, 4, 40)]
    wanted = [t for t in made if t.requires_grad]
    assert all(g.eq(0).all() for g in torch.autograd.grad(outs, wanted, [torch.ones_like(o) for o in outs]))


def test_one_result_unused():
    new, old = both()
    made = inputs()
    wanted = [t for t in made if t.requires_grad]
    for f in (new, old):
        made_grads = torch.autograd.grad(f(*made)[1].sum(), wanted, allow_unused=True)
        made_grads = [torch.zeros_like(t) if g is None else g for g, t in zip(made_grads, wanted, strict=True)]
        first = made_grads if f is new else first  # noqa: F821
    for a, b in zip(first, made_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("z", [False, True])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour(behaviour, z):
    new, _ = both(z=z)
    behaviour(new, lambda n: inputs(rows=(2, n), z=z))


def test_wrong_arguments_are_named():
    new, _ = both(bias=False)
    made = inputs(bias=False)
    with pytest.raises(ValueError, match="frozen"):
        new(made[0], made[1].clone().requires_grad_(), *made[2:])
    with pytest.raises(ValueError, match=r"shapes \[3, 7, 24\]"):
        new(made[0], *made[1:4], made[4][:, 1:], *made[5:])
    with pytest.raises(ValueError, match="z has shape"):
        lora(made[0], made[1:2], [None], made[4:5], made[7:8], [1.0], z=made[0][:1])
    with pytest.raises(ValueError, match="as many"):
        lora(made[0], made[1:3], [None], made[4:5], made[7:8], [1.0])
