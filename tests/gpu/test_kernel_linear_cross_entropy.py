"""The Triton kernels of linear cross entropy, and its chunks, on a GPU."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, compiles_inductor, eager_linear_cross_entropy, strided

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
    chunk, weight = 1024 * 128256 * 2, w.numel() * 2
    assert peak < 1.1 * chunk + 64 * 2**20 + (3.1 * weight if trained else 0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour(behaviour, reduction):
    new, _ = both(reduction=reduction, chunk_tokens=4)
    behaviour(new, lambda n: inputs(rows=(2, n), width=16, classes=37, ignored=2))
