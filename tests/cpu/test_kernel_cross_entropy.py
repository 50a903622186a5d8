"""Cross entropy's reference operator against eager PyTorch and float64."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, eager_cross_entropy, strided

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
    {"z_loss": 1e-2, "softcap": 2.0, "label_smoothing": 0.2},
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
    compare(*both(reduction=reduction, **options), inputs(dtype=dtype))


@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_layouts(order, kind):
    for reduction in ("mean", "none"):
        compare(*both(reduction=reduction), inputs(order=order), kind=kind)


def test_slices_and_expanded_logits():
    z, target = inputs(rows=(3, 8))
    z = z.detach()
    compare(*both(), [z[:, :-1, 2:].requires_grad_(), target[:, 1:] % 35])
    compare(*both(), [z[:, :1].expand(3, 8, 37).requires_grad_(), target])


def test_targets_of_other_integers():
    z, target = inputs(ignored=0)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(cross_entropy(z, target.to(dtype)), cross_entropy(z, target))


def test_one_row():
    z, target = torch.randn(9, requires_grad=True), torch.tensor(4)
    loss, expected = cross_entropy(z, target), torch.nn.functional.cross_entropy(z, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t, z) for t in (loss, expected)))


def test_excluded_classes():
    """Logits of -inf, as a mask leaves them, have probability and gradient 0."""
    z, target = inputs()
    z = z.detach()
    z[..., :20] = float("-inf")
    z.requires_grad_()
    target = torch.where(target < 0, target, 20 + target % 17)
    loss, expected = cross_entropy(z, target), eager_cross_entropy(z, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t, z) for t in (loss, expected)))


def test_ignore_index_and_dtype_of_the_loss():
    z, target = inputs(ignored=0, dtype=torch.bfloat16)
    assert cross_entropy(z, target).dtype is torch.bfloat16
    compare(*both(ignore_index=3, out_dtype=torch.float32, weight=WEIGHT, label_smoothing=0.1), [z, target % 5])


@pytest.mark.parametrize("options", OPTIONS)
def test_all_rows_ignored(options):
    z, target = inputs()
    loss = cross_entropy(z, target.fill_(-100), **options)
    assert loss.isnan()
    assert torch.autograd.grad(loss, z)[0].eq(0).all()
    assert cross_entropy(z, target, reduction="none", **options).eq(0).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_no_rows(options):
    z, target = inputs(rows=(0, 4), ignored=0)
    for reduction in REDUCTIONS:
        loss = cross_entropy(z, target, reduction=reduction, **options)
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert torch.autograd.grad(loss.sum(), z)[0].shape == z.shape
        assert loss.isnan() if reduction == "mean" else loss.sum() == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_upstream_is_applied(reduction):
    """Losses are used with other factors than 1, and from more places than one."""
    compare(*(lambda *t, f=f: f(*t) * 3 + f(*t).square() for f in both(reduction=reduction)), inputs())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_behaviour(behaviour, reduction):
    behaviour(both(reduction=reduction)[0], lambda n: inputs(rows=(2, n), ignored=2))
    behaviour(
        lambda z, t, w: cross_entropy(z, t, weight=w, reduction=reduction, label_smoothing=0.1, z_loss=1e-2),
        lambda n: [*inputs(rows=(2, n), ignored=2), WEIGHT],
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_kept_for_backward(reduction):
    """The logits themselves and two numbers a row; nothing without a gradient."""

    def kept(z):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            cross_entropy(z, target, reduction=reduction)
        return tensors

    z, target = inputs()
    own = [t for t in kept(z) if t.data_ptr() != z.data_ptr()]
    assert len(kept(z)) == len(own) + 1
    assert sum(t.numel() for t in own) <= 3 * target.numel() + 2
    assert kept(z.detach()) == []


def test_logits_that_were_written_to_are_noticed():
    z, target = inputs()
    logits = z * 2
    loss = cross_entropy(logits, target)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_operators_are_well_defined():
    z, target = inputs()
    arguments = (z.detach(), target, WEIGHT, torch.tensor(2.0), -100, 0.1, 1.0, None, 1e-2)
    torch.library.opcheck(torch.ops.rewriter.cross_entropy_forward, arguments)
    _, statistics = torch.ops.rewriter.cross_entropy_forward(*arguments)
    for upstream in (torch.randn(target.numel()), torch.tensor(0.5)):
        arguments = (z.detach(), target, WEIGHT, statistics, upstream, -100, 0.1, 1.0, None)
        torch.library.opcheck(torch.ops.rewriter.cross_entropy_backward, arguments)


def test_wrong_arguments_are_named():
    z, target = inputs()
    with pytest.raises(ValueError, match="mean, sum or none"):
        cross_entropy(z, target, reduction="avg")
    with pytest.raises(ValueError, match="20 elements for 21 rows"):
        cross_entropy(z, target.flatten()[:-1])
    with pytest.raises(ValueError, match="label_smoothing"):
        cross_entropy(z, target, label_smoothing=-0.1)
    with pytest.raises(ValueError, match=r"shape \[37\], not \[36\]"):
        cross_entropy(z, target, weight=torch.ones(36))
    with pytest.raises(ValueError, match="not require a gradient"):
        cross_entropy(z, target, weight=torch.ones(37, requires_grad=True))
    z, target = inputs(ignored=0)
    target[0, 0] = 37
    with pytest.raises((RuntimeError, IndexError)):
        cross_entropy(z, target)
