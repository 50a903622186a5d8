"""Cross entropy's Triton kernels, interpreted, on small odd shapes."""

import pytest
import torch
from numerics import compare, eager_cross_entropy, fakes, strided

from rewriter.kernels.cross_entropy import cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]
WEIGHT = torch.linspace(0.5, 2.0, 37)
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 3.0, "scale": 0.7},
    {"weight": WEIGHT},
    {"weight": WEIGHT, "label_smoothing": 0.2, "z_loss": 1e-2},
    {"z_loss": 1e-2, "softcap": 2.0, "label_smoothing": 0.2, "scale": -1.5},
]


def both(**options):
    return lambda z, t: cross_entropy(z, t, **options), lambda z, t: eager_cross_entropy(z, t, **options)


def inputs(rows=(3, 7), classes=37, dtype=torch.float32, ignored=5, order=None):
    target = torch.randint(0, classes, rows, generator=torch.Generator().manual_seed(0))
    target.view(-1)[1 : 1 + ignored] = -100
    return [strided(*rows, classes, dtype=dtype, order=order), target]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_numbers(dtype, reduction, options):
    compare(*both(reduction=reduction, **options), inputs(rows=(2, 4), dtype=dtype, ignored=2))


@pytest.mark.parametrize("classes", [1, 2, 64, 4097, 9001])
def test_class_counts(classes):
    """One tile or several, with a ragged last one."""
    weight = torch.linspace(0.5, 2.0, classes)
    for options in [{}, {"weight": weight, "label_smoothing": 0.2, "z_loss": 1e-2}] if classes > 1 else [{}]:
        compare(*both(**options), inputs(rows=(4,), classes=classes, ignored=1))


@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_layouts(order, kind):
    for reduction in ("mean", "none"):
        compare(*both(reduction=reduction), inputs(order=order), kind=kind)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_are_apart(reduction):
    """Logits padded, cut or expanded: neither they nor what lies between them is read as a class or written to."""
    whole, target = inputs(rows=(3, 8), classes=48)
    whole = whole.detach()
    whole[..., 37:] = float("nan")
    compare(*both(reduction=reduction), [whole[..., :37].requires_grad_(), target % 37])
    compare(*both(reduction=reduction), [whole[:, :-1, 2:37].requires_grad_(), target[:, 1:] % 35])
    compare(*both(reduction=reduction), [whole[:, :1, :37].expand(3, 8, 37).requires_grad_(), target % 37])


def test_targets_of_other_integers():
    z, target = inputs(ignored=0)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(cross_entropy(z, target.to(dtype)), cross_entropy(z, target))


@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT}])
def test_excluded_classes(options):
    """Logits of -inf, as a mask leaves them, have probability and gradient 0, also where they fill a whole tile."""
    z, target = inputs(rows=(4,), classes=4133, ignored=1)
    z = z.detach()
    z[..., :4096] = float("-inf")
    z.requires_grad_()
    target = torch.where(target < 0, target, 4096 + target % 37)
    options = {name: torch.linspace(0.5, 2.0, 4133) for name in options}
    loss, expected = cross_entropy(z, target, **options), eager_cross_entropy(z, target, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t, z) for t in (loss, expected)))


@pytest.mark.parametrize("options", OPTIONS)
def test_all_rows_ignored(options):
    z, target = inputs(rows=(3,))
    loss = cross_entropy(z, target.fill_(-100), **options)
    assert loss.isnan()
    assert torch.autograd.grad(loss, z)[0].eq(0).all()
    assert cross_entropy(z, target, reduction="none", **options).eq(0).all()


def test_no_rows():
    z, target = inputs(rows=(0, 4), ignored=0)
    for reduction in REDUCTIONS:
        loss = cross_entropy(z, target, reduction=reduction, weight=WEIGHT)
        assert torch.autograd.grad(loss.sum(), z)[0].shape == z.shape


@pytest.mark.parametrize("options", OPTIONS)
def test_unknown_class_is_a_nan_loss(options):
    z, target = inputs(rows=(3,), ignored=0)
    target[0] = 37
    assert cross_entropy(z, target, **options).isnan()


def test_large_logits_do_not_overflow():
    compare(*both(scale=1e4), inputs())


def test_upstream_is_applied():
    for reduction in REDUCTIONS:
        compare(*(lambda *t, f=f: f(*t) * 3 + f(*t).square() for f in both(reduction=reduction)), inputs())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layouts_are_those_of_the_fake_operator(reduction):
    fakes(both(reduction=reduction)[0], lambda n: inputs(rows=(2, n), ignored=2, order=(1, 0, 2)))
