"""Results on demand and autograd: history in C++, hooks and gradients by name, and weights that change meanwhile."""

import pytest
import torch
from training.test_own_loss import IDS, LOSSES, TEACHER, USES, assert_equal_gradients, assert_same, pair


class Custom(torch.autograd.Function):
    """Kernels of others come as these, which a tensor subclass isn't asked about."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sin().sum()

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return grad * z.cos()


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def written_elsewhere(z):
    z.transpose(0, 2)[0].mul_(2)
    return z.mean() + Custom.apply(z)


FUNCTIONS = {
    "function": Custom.apply,
    "part": lambda z: Custom.apply(z[:, 1:]),
    "cast": lambda z: Custom.apply(z.double()),
    "twice": lambda z: Custom.apply(z) + Custom.apply(z * 2) + LOSSES["shifted"](z),
    "after it was read": lambda z: z.square().mean() + Custom.apply(z),
    "after it was written": lambda z: z.mul_(2).mean() + Custom.apply(z),
    "a plain view written": written_elsewhere,
    "passed on": lambda z: LOSSES["shifted"](Same.apply(z)) + z.mean(),
    "engine": lambda z: Same.apply(z).square().sum() + Same.apply(z[:, 2:]).logsumexp(-1).sum(),
    "hooked": lambda z: (z.register_hook(lambda g: g * 3), LOSSES["shifted"](z) + Custom.apply(z))[1],
    "part hooked": lambda z: (s := z[:, 1:], s.register_hook(lambda g: g * 3), s.logsumexp(-1).sum() + z.mean())[2],
    "compiled": lambda z: torch.compile(lambda t: (t.float() * 2).log_softmax(-1)[..., 3].sum(), backend="eager")(z),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_where_python_does_not_see_it(name):
    assert_same(FUNCTIONS[name], bias=True, cap=2.0)


def test_the_engine_and_autograd_grad():
    model, eager = pair()
    for m in (model, eager):
        z = m(IDS)
        torch.autograd.backward([z], [TEACHER])
    assert_equal_gradients(model, eager)
    found = []
    for m in (model, eager):
        z = m(IDS)
        z.retain_grad()
        LOSSES["shifted"](z).backward(retain_graph=True)
        found.append((z.grad, *torch.autograd.grad(z.square().sum(), [m.head.weight])))
    for new, old in zip(*found, strict=True):
        torch.testing.assert_close(new, old)


def test_a_write_that_autograd_has_not_seen_is_refused():
    z = pair()[0](IDS)
    part = z.transpose(0, 2)[0]
    part.mul_(2)
    with pytest.raises(RuntimeError, match="written in place"):
        Custom.apply(z)


def test_a_hook_that_would_miss_the_loss_is_refused():
    z = pair()[0](IDS)
    LOSSES["shifted"](z)
    with pytest.raises(RuntimeError, match="before the loss"):
        z.register_hook(lambda g: g)
    z.sin()  # all of it is there now, and the loss still went another way
    for ask in (lambda: z.register_hook(lambda g: g), z.retain_grad):
        with pytest.raises(RuntimeError, match="before the loss"):
            ask()


def test_a_gradient_that_would_miss_the_loss_is_refused():
    """Asked for by name, it would be None, or a part of it, with nothing said."""
    for ask in (
        lambda loss, z: torch.autograd.grad(loss, [z], allow_unused=True),
        lambda loss, z: torch.autograd.grad(outputs=loss, inputs=z),
        lambda loss, z: loss.backward(inputs=[z]),
    ):
        z = pair()[0](IDS)
        with pytest.raises(RuntimeError, match="before the loss"):
            ask(LOSSES["shifted"](z), z)


def test_what_has_no_gradient_keeps_nothing_from_the_loss():
    model, eager = pair()
    for m in (model, eager):
        z = m(IDS)
        z.argmax(-1), z.detach().logsumexp(-1)
        z.register_hook(lambda g: g * 2)
        LOSSES["shifted"](z).backward()
    assert_equal_gradients(model, eager)


def _write(weight):
    with torch.no_grad():
        weight.mul_(2)


def _write_and_step(weight):
    _write(weight)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()


def _exchange(weight):
    weight.data = weight.data * 2


def _give_back(weight):
    weight.untyped_storage().resize_(0)


@pytest.mark.parametrize("change", [_write, _write_and_step, _exchange, _give_back])
def test_a_weight_that_is_another_by_then_is_an_error(change):
    model, _ = pair()
    z = model(IDS)
    change(model.head.weight)
    for read in (lambda: z.argmax(-1), lambda: LOSSES["shifted"](z), lambda: z.sin()):
        with pytest.raises(RuntimeError, match="changed in place"):
            read()


@pytest.mark.parametrize("loss", [LOSSES["shifted"], USES["softmax"]], ids=["fused", "whole"])
def test_a_head_that_is_thawed_after_the_forward(loss):
    model, eager = pair(frozen=True)
    for m in (model, eager):
        z = m(IDS)
        m.head.weight.requires_grad_(True)
        loss(z).backward()
    assert model.head.weight.grad is None
    assert_equal_gradients(model, eager)
