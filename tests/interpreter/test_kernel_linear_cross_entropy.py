"""The Triton kernels of linear cross entropy, interpreted, on small odd shapes."""

import pytest
import torch
from numerics import compare, eager_linear_cross_entropy, fakes, strided

from rewriter.kernels import linear_cross_entropy_triton
from rewriter.kernels.linear_cross_entropy import linear_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 3.0, "scale": 0.7},
    {"softcap": 2.0, "label_smoothing": 0.2, "scale": -1.5},
]
WEIGHTED = {"class_weight": torch.linspace(0.5, 2.0, 37), "label_smoothing": 0.2, "z_loss": 1e-2}


def both(**options):
    return (
        lambda x, w, t, b=None: linear_cross_entropy(x, w, t, bias=b, **options),
        lambda x, w, t, b=None: eager_linear_cross_entropy(x, w, t, b, **options),
    )


def inputs(rows=(3, 7), width=16, classes=37, dtype=torch.float32, bias=True, ignored=5, seed=0):
    target = torch.randint(0, classes, rows, generator=torch.Generator().manual_seed(seed))
    target.view(-1)[1 : 1 + ignored] = -100
    x, w = strided(*rows, width, dtype=dtype, seed=seed), strided(classes, width, dtype=dtype, seed=seed + 1)
    return [x, w, target, *([strided(classes, dtype=dtype, seed=seed + 2)] if bias else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [*OPTIONS, WEIGHTED])
def test_numbers(dtype, reduction, options):
    compare(*both(reduction=reduction, chunk_tokens=8, **options), inputs(dtype=dtype))


@pytest.mark.parametrize("classes", [1, 2, 64, 4097, 9001])
def test_class_counts(classes):
    """One tile or several, with a ragged last one."""
    for options in OPTIONS if classes > 1 else [{}]:
        compare(*both(chunk_tokens=4, **options), inputs(rows=(7,), width=24, classes=classes, ignored=1))


@pytest.mark.parametrize("kind", ["dense", "expanded"])
def test_upstream_of_each_row(kind):
    compare(*both(chunk_tokens=5, reduction="none"), inputs(bias=False), kind=kind)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_matmul_dtype_is_what_autocast_does(reduction):
    new, _ = both(reduction=reduction, matmul_dtype=torch.bfloat16, chunk_tokens=8)
    _, eager = both(reduction=reduction)

    def old(x, w, t, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return eager(x, w, t, b)

    compare(new, old, inputs(), truth=eager, dtype=torch.bfloat16)


def test_all_rows_ignored():
    x, w, target = inputs(bias=False)
    loss = linear_cross_entropy(x, w, target.fill_(-100))
    assert loss.isnan()
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (x, w)))


def test_unknown_class_is_a_nan_loss():
    x, w, target = inputs(bias=False)
    target[0, 0] = 37
    assert linear_cross_entropy(x, w, target).isnan()


def test_large_logits_do_not_overflow():
    compare(*both(chunk_tokens=8, scale=1e4), inputs(bias=False))


def test_no_rows():
    x, w, target, b = inputs(rows=(0, 4), ignored=0)
    loss = linear_cross_entropy(x, w, target, bias=b, reduction="sum")
    assert loss == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (x, w, b)))


def test_layouts_are_those_of_the_fake_operator():
    fakes(both(chunk_tokens=4)[0], lambda n: inputs(rows=(2, n), ignored=2))


@pytest.fixture
def hopper(monkeypatch):
    """The kernels of Hopper, with small tiles; float32 stands for bfloat16, which the interpreter can't multiply."""
    monkeypatch.setattr(linear_cross_entropy_triton, "suits", lambda *_: True)
    monkeypatch.setattr(linear_cross_entropy_triton, "TILE", (16, 32, 16))


HOPPER = [
    {},
    {"softcap": 3.0, "scale": 0.7},
    {"softcap": 3.0, "scale": -1.5, "z_loss": 1e-2, "class_weight": torch.linspace(0.0, 2.0, 75)},
]


@pytest.mark.parametrize("options", HOPPER)
@pytest.mark.parametrize(("reduction", "ignored"), [("mean", 5), ("sum", 20), ("none", 0), ("none", 5)])
def test_exponentials(hopper, reduction, options, ignored):
    x, w, target, b = inputs(rows=(3, 13), classes=75, width=20, ignored=ignored)
    compare(*both(reduction=reduction, chunk_tokens=16, **options), [x, w, target, b.detach()])
    compare(*both(reduction=reduction, chunk_tokens=23, **options), [x, w.detach(), target])


@pytest.mark.parametrize(
    ("scale", "options"), [(30.0, {}), (1e3, {"z_loss": 1e-3}), (30.0, {"softcap": 400.0}), (1e3, {"softcap": 400.0})]
)
def test_exponentials_too_large_for_the_dtype(hopper, scale, options):
    """Some rows, or all, are done again as logits."""
    x, w, target = inputs(rows=(3, 13), classes=75, width=20, bias=False)
    compare(*both(chunk_tokens=16, reduction="none", scale=scale, **options), [x, w, target])


def test_exponentials_of_an_unknown_class_and_of_no_number(hopper):
    x, w, target = inputs(rows=(39,), classes=75, width=20, bias=False)
    target[0], target[7] = 75, 1 << 40
    with torch.no_grad():
        x[1] = float("nan")
    assert target[1] == -100
    losses = linear_cross_entropy(x, w, target, reduction="none", chunk_tokens=16)
    assert losses.isnan().nonzero().flatten().tolist() == [0, 7]
    (dx,) = torch.autograd.grad(losses[8:].sum(), x)
    assert dx[8:].isfinite().all() and dx[1].eq(0).all()


def test_exponentials_all_ignored(hopper):
    x, w, target = inputs(rows=(39,), classes=75, width=20, bias=False)
    loss = linear_cross_entropy(x, w, target.fill_(-100), reduction="sum", chunk_tokens=16)
    assert loss == 0 and all(g.eq(0).all() for g in torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_exponentials_of_vectors_that_are_columns(hopper, reduction):
    """Targets, bias and class weights whose numbers lie apart, as one codebook of several."""
    x, weight, target, bias = inputs(ignored=3)
    targets = torch.full((*target.shape, 4), -100)
    targets[..., 1] = target
    table, weights = torch.randn(len(bias), 3), torch.rand(len(bias), 2)
    table[:, 1] = bias.detach()

    def loss(target, bias, class_weight):
        return linear_cross_entropy(x, weight, target, bias=bias, class_weight=class_weight, reduction=reduction)

    dense = loss(target, table[:, 1].contiguous(), weights[:, 1].contiguous())
    assert torch.equal(loss(targets[..., 1], table[:, 1], weights[:, 1]), dense)


@pytest.mark.parametrize(
    "dtype", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [*OPTIONS, WEIGHTED])
def test_adapter(dtype, reduction, options):
    """Beside the kernel of rows, where logits have rows that are padded."""
    x, w, target, b = inputs(dtype=dtype[0])
    u, up = strided(3, 7, 5, dtype=dtype[1], seed=7), strided(37, 5, dtype=dtype[1], seed=8)
    new, old = (
        lambda x, w, t, u, up, b, f=f: f(x, w, t, b, u=u, up=up, reduction=reduction, chunk_tokens=8, **options)
        for f in (lambda x, w, t, b, **o: linear_cross_entropy(x, w, t, bias=b, **o), eager_linear_cross_entropy)
    )
    compare(new, old, [x, w, target, u, up, b], dtype=dtype[0])
