"""The Triton kernels of linear cross entropy, and its chunks, on a GPU."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, compiles_inductor, eager_linear_cross_entropy, strided

from rewriter.kernels.dequantize_4bit import Packed4bit, dequantize_4bit
from rewriter.kernels.linear_cross_entropy import linear_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 30.0, "scale": 0.7},
    {"softcap": 5.0, "label_smoothing": 0.2, "out_dtype": torch.float32},
    {"class_weight": torch.linspace(0.5, 2.0, 5003), "label_smoothing": 0.2, "z_loss": 1e-2},
]


def both(**options):
    return (
        lambda x, w, t, b=None: linear_cross_entropy(x, w, t, bias=b, **options),
        lambda x, w, t, b=None: eager_linear_cross_entropy(x, w, t, b, **options),
    )


def inputs(rows=(3, 77), width=96, classes=5003, dtype=torch.float32, bias=True, ignored=5, scale=0.1):
    target = torch.randint(0, classes, rows, generator=torch.Generator().manual_seed(0))
    target.view(-1)[1 : 1 + ignored] = -100
    x = strided(*rows, width, dtype=dtype, device="cuda")
    w = (strided(classes, width, dtype=dtype, device="cuda", grad=False, seed=1) * scale).requires_grad_()
    return [x, w, target.cuda(), *([strided(classes, dtype=dtype, device="cuda", seed=2)] if bias else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_numbers(dtype, reduction, options):
    options = {k: v for k, v in options.items() if k != "out_dtype" or dtype is not torch.float64}
    options = {k: v.cuda() if k == "class_weight" else v for k, v in options.items()}
    compare(*both(reduction=reduction, chunk_tokens=64, **options), inputs(dtype=dtype))


@pytest.mark.parametrize("classes", [2, 1000, 50257, 151936])
@pytest.mark.parametrize("chunk", [None, 128])
def test_class_counts(classes, chunk):
    compare(*both(chunk_tokens=chunk), inputs(classes=classes, dtype=torch.bfloat16, bias=False))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matmul_dtype_is_what_autocast_does(reduction, dtype):
    new, _ = both(reduction=reduction, matmul_dtype=dtype, chunk_tokens=64)
    _, eager = both(reduction=reduction)

    def old(x, w, t, b):
        with torch.autocast("cuda", dtype=dtype):
            return eager(x, w, t, b)

    compare(new, old, inputs(), truth=eager, dtype=dtype)


HOPPER_OPTIONS = [
    {},
    {"scale": -0.7},
    {"softcap": 5.0, "scale": 0.7},
    {"class_weight": torch.linspace(0.0, 2.0, 5003), "z_loss": 1e-2},
    {"softcap": 30.0, "z_loss": 1e-3, "class_weight": torch.linspace(0.5, 2.0, 5003)},
]


def plain(bias=False, **options):
    """Inputs that the kernels of Hopper take: bfloat16, and no gradient for the bias."""
    x, w, target, *b = inputs(dtype=torch.bfloat16, bias=bias, **options)
    return [x, w, target, *(t.detach() for t in b)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", HOPPER_OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_exponentials(options, reduction, bias):
    options = {k: v.cuda() if k == "class_weight" else v for k, v in options.items()}
    compare(*both(reduction=reduction, chunk_tokens=128, **options), plain(bias))


@pytest.mark.parametrize("width", [8, 1000, 1536])
@pytest.mark.parametrize("rows, ignored", [((1,), 0), ((3, 171), 200), ((513,), 512), ((2, 300), 600)])
def test_exponentials_of_odd_shapes(width, rows, ignored):
    compare(*both(chunk_tokens=256, reduction="sum"), plain(width=width, rows=rows, ignored=ignored, classes=4099))


@pytest.mark.parametrize("scale", [10.0, 1000.0])
@pytest.mark.parametrize("options", [{}, {"softcap": 500.0, "z_loss": 1e-3}])
def test_exponentials_too_large_for_the_dtype(scale, options):
    """Some rows, or all, are done again as logits."""
    compare(*both(chunk_tokens=128, **options), plain(scale=scale))
    compare(*both(chunk_tokens=128, reduction="none", **options), plain(scale=scale, bias=True))


def test_a_masked_class():
    """A bias of -inf for classes that are never a target."""
    x, w, target, b = plain(bias=True)
    b[target.unique()[-1] + 1 :] = float("-inf")
    compare(*both(chunk_tokens=128), [x, w, target, b])


def test_not_a_number_stays_in_its_row():
    x, w, target = plain()
    with torch.no_grad():
        x[0, 1] = float("nan")
    assert target[0, 1] == -100
    loss = linear_cross_entropy(x, w, target, chunk_tokens=128)
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and dx.isfinite().all()


def test_unknown_class_is_a_nan_loss():
    for unknown in (5003, -1, 1 << 40):
        x, w, target = plain()
        target[0, 0] = unknown
        losses = linear_cross_entropy(x, w, target, reduction="none", chunk_tokens=128)
        assert losses[0].isnan() and losses[1:].isfinite().all()


def test_float32_weights_under_autocast():
    """Their gradient is summed in float32 over the chunks."""
    (new, _), (_, old) = both(chunk_tokens=128, matmul_dtype=torch.bfloat16), both()

    def eager(x, w, t):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return old(x, w, t)

    compare(new, eager, inputs(bias=False), truth=old, dtype=torch.bfloat16)


def test_backward_twice():
    x, w, target = plain()
    loss = linear_cross_entropy(x, w, target, chunk_tokens=128)
    first = torch.autograd.grad(3 * loss, (x, w), retain_graph=True)
    first = [g.clone() for g in first]
    for g, again in zip(first, torch.autograd.grad(3 * loss, (x, w)), strict=True):
        torch.testing.assert_close(again, g, rtol=0, atol=0)


def test_frozen_weight():
    x, w, target = inputs(dtype=torch.bfloat16, bias=False)
    compare(*both(chunk_tokens=100), [x, w.detach(), target])


def test_all_rows_ignored():
    x, w, target = inputs(bias=False)
    loss = linear_cross_entropy(x, w, target.fill_(-100))
    assert loss.isnan()
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (x, w)))


def test_never_waits_for_the_device():
    arguments = inputs(dtype=torch.bfloat16, bias=False)
    linear_cross_entropy(*arguments).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(*arguments, chunk_tokens=64).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("trained", [False, True])
def test_memory_is_that_of_one_chunk(trained):
    x, w, target = inputs(rows=(8192,), width=512, classes=128256, dtype=torch.bfloat16, bias=False)
    w.requires_grad_(trained)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, w, target).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 600 * 2**20 + x.numel() * 2 + (w.numel() * 2 if trained else 0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour(behaviour, reduction):
    new, _ = both(reduction=reduction, chunk_tokens=4)
    behaviour(new, lambda n: inputs(rows=(2, n), width=16, classes=37, ignored=2))


def with_adapter(**options):
    def ours(x, w, t, u, up, b=None):
        return linear_cross_entropy(x, w, t, bias=b, u=u, up=up, **options)

    def eager(x, w, t, u, up, b=None):
        return eager_linear_cross_entropy(x, w, t, b, u=u, up=up, **options)

    return ours, eager


def adapted(dtype, wide=None, rows=(3, 77), classes=5003, rank=16, **options):
    x, w, target, *b = inputs(rows=rows, classes=classes, dtype=dtype, **options)
    u, up = (
        strided(n, rank, dtype=wide or dtype, device="cuda", seed=s) for n, s in ((rows[0] * rows[1], 7), (classes, 8))
    )
    up = (up.detach() * 0.1).requires_grad_()
    return [x, w, target, u.detach().view(*rows, rank).requires_grad_(), up, *b]


@pytest.mark.parametrize("dtype", [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS[:3])
def test_adapter(dtype, reduction, options):
    """Beside a bfloat16 head of a width and number of classes that Hopper's kernels would take, too."""
    compare(*with_adapter(reduction=reduction, chunk_tokens=64, **options), adapted(*dtype), dtype=dtype[0])


def test_memory_with_an_adapter_is_that_of_one_chunk():
    x, w, target, u, up = adapted(torch.bfloat16, rows=(8, 1024), width=512, classes=128256, bias=False)
    w.requires_grad_(False)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, w, target, u=u, up=up).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 600 * 2**20 + 2 * (x.numel() + u.numel() + 6 * up.numel())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour_with_an_adapter(behaviour, reduction):
    new, _ = with_adapter(reduction=reduction, chunk_tokens=4)
    behaviour(new, lambda n: adapted(torch.float32, rows=(2, n), width=16, classes=37, rank=3, ignored=2))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weight_in_4_bits(reduction):
    generator = torch.Generator().manual_seed(9)
    data = torch.randint(0, 256, (5120 * 128 // 2, 1), generator=generator, dtype=torch.uint8).cuda()
    absmax = (torch.rand(5120 * 2, generator=generator) * 0.1 + 0.1).cuda()
    weight = Packed4bit(data, absmax, None, None, None, (5120, 128), 64, 256, "nf4", torch.bfloat16)
    matrix = dequantize_4bit(weight)
    x, _, target, u, up = adapted(torch.bfloat16, width=128, classes=5120, bias=False)
    for extra in ([], [u, up]):
        new, old = (
            lambda x, t, *e, f=f, w=w: f(x, w.to(x.dtype) if w is matrix else w, t, reduction=reduction,
                                         **dict(zip(("u", "up"), e, strict=False)))
            for f, w in ((linear_cross_entropy, weight), (eager_linear_cross_entropy, matrix))
        )  # fmt: skip
        compare(new, old, [x, target, *extra])
