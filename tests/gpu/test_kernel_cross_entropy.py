"""Cross entropy's Triton kernels on a GPU."""

import pytest
import torch
from numerics import BEHAVIOURS, compare, compiles_inductor, eager_cross_entropy, strided

from rewriter.kernels.cross_entropy import cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 30.0, "scale": 0.7},
    {"weight": True},
    {"weight": True, "label_smoothing": 0.2, "z_loss": 1e-2},
    {"z_loss": 1e-2, "softcap": 5.0, "label_smoothing": 0.2, "out_dtype": torch.float32},
]


def both(**options):
    return lambda z, t: cross_entropy(z, t, **options), lambda z, t: eager_cross_entropy(z, t, **options)


def weights(classes):
    return torch.linspace(0.5, 2.0, classes, device="cuda")


def inputs(rows=(3, 77), classes=5003, dtype=torch.float32, ignored=5, order=None):
    target = torch.randint(0, classes, rows, generator=torch.Generator().manual_seed(0))
    target.view(-1)[1 : 1 + ignored] = -100
    return [strided(*rows, classes, dtype=dtype, order=order, device="cuda"), target.cuda()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_numbers(dtype, reduction, options):
    options = {k: v for k, v in options.items() if k != "out_dtype" or dtype is not torch.float64}
    options |= {"weight": weights(5003)} if "weight" in options else {}
    compare(*both(reduction=reduction, **options), inputs(dtype=dtype))


@pytest.mark.parametrize("classes", [1, 2, 10, 1000, 50257, 151936])
def test_class_counts(classes):
    compare(*both(), inputs(classes=classes, dtype=torch.bfloat16))
    if classes > 1:
        options = {"weight": weights(classes), "label_smoothing": 0.1, "z_loss": 1e-3}
        compare(*both(**options), inputs(classes=classes, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", ["dense", "expanded", "strided"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_layouts(order, kind):
    for reduction in ("mean", "none"):
        compare(*both(reduction=reduction), inputs(order=order, classes=514), kind=kind)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_are_apart(reduction):
    """Logits padded, cut or expanded: neither they nor what lies between them is read as a class or written to."""
    whole, target = inputs(classes=1088)
    whole = whole.detach()
    whole[..., 1003:] = float("nan")
    compare(*both(reduction=reduction), [whole[..., :1003].requires_grad_(), target % 1003])
    compare(*both(reduction=reduction), [whole[:, :-1, 2:1003].requires_grad_(), target[:, 1:] % 1001])
    compare(*both(reduction=reduction), [whole[:, :1, :1003].expand(3, 77, 1003).requires_grad_(), target % 1003])


def test_excluded_classes():
    z, target = inputs(classes=8192)
    z = z.detach()
    z[..., :5000] = float("-inf")
    z.requires_grad_()
    target = torch.where(target < 0, target, 5000 + target % 3192)
    loss, expected = cross_entropy(z, target), eager_cross_entropy(z, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t, z)[0] for t in (loss, expected)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_offsets_pass_32_bits(reduction):
    z = torch.zeros((1 << 31) // 65536 + 3, 65536, dtype=torch.bfloat16, device="cuda")
    z[-2:] = strided(2, 65536, dtype=torch.bfloat16, device="cuda", grad=False)
    target = torch.full((len(z),), -100, device="cuda")
    target[-2:] = torch.tensor([5, 65535])
    tail = z[-2:].clone().requires_grad_()
    z.requires_grad_()
    loss, expected = (cross_entropy(t, target[-len(t) :], reduction=reduction) for t in (z, tail))
    assert torch.equal(loss[-2:] if reduction == "none" else loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    assert torch.equal(z.grad[-2:], tail.grad)
    assert z.grad[:-2].eq(0).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_all_rows_ignored(weighted):
    z, target = inputs()
    loss = cross_entropy(z, target.fill_(-100), weight=weights(5003) if weighted else None)
    assert loss.isnan()
    assert torch.autograd.grad(loss, z)[0].eq(0).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_unknown_class_is_a_nan_loss(weighted):
    z, target = inputs()
    target[0, 0] = 5003
    assert cross_entropy(z, target, weight=weights(5003) if weighted else None).isnan()


def test_never_waits_for_the_device():
    arguments, options = inputs(dtype=torch.bfloat16), {"weight": weights(5003), "z_loss": 1e-3}
    cross_entropy(*arguments, **options).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy(*arguments, **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory():
    """Forward makes one gradient, backward a second one; without a gradient nothing of that size is made."""
    z, target = inputs(rows=(2048,), classes=32768, dtype=torch.bfloat16)
    size, before = z.numel() * 2, torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cross_entropy(z.detach(), target)
    assert torch.cuda.max_memory_allocated() - before < 2**20
    cross_entropy(z, target).backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * size + 2**20


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("behaviour", [*BEHAVIOURS, compiles_inductor])
def test_behaviour(behaviour, reduction):
    behaviour(both(reduction=reduction)[0], lambda n: inputs(rows=(2, n), classes=37, ignored=2))
    behaviour(
        lambda z, t, w: cross_entropy(z, t, weight=w, reduction=reduction, label_smoothing=0.1, z_loss=1e-2),
        lambda n: [*inputs(rows=(2, n), classes=37, ignored=2), weights(37)],
    )
