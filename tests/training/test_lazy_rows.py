"""Logits on demand, read row by row: what eager has, with exact gradients, and never all of them at once."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training.common import relative

import rewriter
from rewriter import lazy_rows
from rewriter.lazy import LazyTensor

B, T, D, V = 2, 9, 8, 50
TARGET = torch.arange(B * T).view(B, T) * 7 % V
WEIGHT = torch.Size((V, D))
IGNORING = TARGET.masked_fill(TARGET % 3 == 0, -100)
CLASS_WEIGHT = torch.linspace(0.1, 2, V)
MASK = TARGET % 2 == 0


class Head(nn.Module):
    def __init__(self, bias=False, cap=0.0, scale=1.0):
        super().__init__()
        self.body, self.head, self.cap, self.scale = nn.Linear(D, D), nn.Linear(D, V, bias), cap, scale

    def forward(self, x, labels):
        logits = self.head(self.body(x)) * self.scale
        if self.cap:
            logits = torch.tanh(logits / self.cap) * self.cap
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of rows of logits that were there at once, at most."""

    def __init__(self):
        super().__init__()
        self.rows, self.called = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.called.add(function)
        for t in torch.utils._pytree.tree_leaves(out):
            plain = isinstance(t, torch.Tensor) and not isinstance(t, LazyTensor) and not t.is_meta
            if plain and t.dim() and t.shape[-1] == V:
                self.rows = max(self.rows, 0 if t.shape in (WEIGHT, WEIGHT[::-1]) else t.numel() // V)
        return out


def softmax_entropy(z):
    p = z.softmax(-1)
    return -(p * p.log()).sum(-1)


def entropy(z):
    logs = F.log_softmax(z.float(), dim=-1)
    return -(logs.exp() * logs).sum(-1)


# Those that never need all rows, and have a gradient or none.
READS = {
    "argmax": lambda z: z.argmax(-1),
    "argmax, kept": lambda z: torch.argmax(z.detach(), dim=2, keepdim=True),
    "max": lambda z: z.max(-1),
    "max of some": lambda z: z[:, 1:4].max(dim=-1).values,
    "amax": lambda z: z.amax(-1, keepdim=True),
    "topk": lambda z: z.topk(3),
    "topk by name": lambda z: torch.topk(z, k=2, dim=-1, largest=False),
    "logsumexp": lambda z: z.logsumexp(-1),
    "z-loss": lambda z: torch.logsumexp(z.float(), dim=-1).square().mean(),
    "entropy": entropy,
    "entropy of softmax": softmax_entropy,
    "log-probabilities": lambda z: z.log_softmax(-1).gather(-1, TARGET[..., None]).squeeze(-1),
    "shifted log-probabilities": lambda z: (
        z[:, :-1].float().log_softmax(dim=-1).gather(dim=-1, index=TARGET[:, 1:].unsqueeze(-1))
    ),
    "temperature": lambda z: (z / 0.7).softmax(-1).max(-1).values,
    "mean": lambda z: z.mean(-1),
    "one position": lambda z: z[:, -1, :].argmax(-1),
    "one row": lambda z: z[0, 2].max(0).values,
    "by mask": lambda z: z[MASK].logsumexp(-1),
    "by positions": lambda z: z[torch.arange(B), torch.tensor([3, 5])].argmax(-1),
    "ellipsis": lambda z: z[..., :-1, :].contiguous().view(-1, V).argmax(1),
    "flattened": lambda z: z.flatten(0, 1).logsumexp(1),
    "another batch": lambda z: z.unsqueeze(0).amax(-1),
    "loss": lambda z: F.cross_entropy(z.view(-1, V), TARGET.view(-1)),
    "shifted loss": lambda z: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), IGNORING[..., 1:].reshape(-1)),
    "loss of floats": lambda z: nn.CrossEntropyLoss(label_smoothing=0.1)(z.float().flatten(0, 1), IGNORING.flatten()),
    "sum": lambda z: F.cross_entropy(z.reshape(-1, V), IGNORING.view(-1), reduction="sum") / 7,
    "losses": lambda z: F.cross_entropy(z.flatten(0, 1), IGNORING.flatten(), reduction="none"),
    "weighted": lambda z: F.cross_entropy(z.flatten(0, 1), IGNORING.flatten(), CLASS_WEIGHT, label_smoothing=0.2),
    "turned": lambda z: F.cross_entropy(z.transpose(1, 2), TARGET),
    "turned rows": lambda z: z.transpose(0, 1).logsumexp(-1),
    "turned, some": lambda z: F.cross_entropy(z[:, 1:].permute(0, 2, 1).float(), IGNORING[:, 1:], reduction="none"),
    "nothing counts": lambda z: F.cross_entropy(z.flatten(0, 1), torch.full((B * T,), -100)).nan_to_num(),
}  # fmt: skip
# Those that do, and are eager's all the same.
WHOLE = {
    "all": lambda z: z * 1,
    "other dimension": lambda z: z.softmax(1),
    "over everything": lambda z: z.logsumexp((1, 2)),
    "part of the classes": lambda z: z[..., 3:7],
    "classes by ellipsis": lambda z: z[0, ..., 2],
    "turned and read": lambda z: z.transpose(1, 2).softmax(1),
    "soft labels": lambda z: F.cross_entropy(z.flatten(0, 1), torch.full((B * T, V), 1 / V)),
    "list": lambda z: z[[0]],
    "regrouped": lambda z: z.reshape(-1),
    "distance": lambda z: F.kl_div(z.log_softmax(-1), torch.full((B, T, V), 1 / V), reduction="batchmean"),
    "in place": lambda z: z.clone().mul_(2),
    "times a tensor": lambda z: z * torch.arange(V),
}
MODELS = {"plain": {}, "bias": dict(bias=True), "capped": dict(cap=2.0, scale=3.0)}


def pair(options, dtype=torch.float32):
    torch.manual_seed(0)
    eager = Head(**options).to(dtype)
    model = rewriter.optimize(copy.deepcopy(eager))
    x = torch.randn(B, T, D, dtype=dtype)
    return model, eager, x


def results_of(value):
    return list(value) if isinstance(value, tuple) else [value]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(lazy_rows, "ELEMENTS", 4 * V)


def outcome(model, x, read, with_loss=False):
    loss, logits = model(x, TARGET)
    with Watch() as watch:
        results = results_of(read(logits))
        terms = [r.float().sin().sum() for r in results if r.is_floating_point() and r.requires_grad]
        if with_loss:
            terms.append(loss)
        gradients = torch.autograd.grad(sum(terms), list(model.parameters()), allow_unused=True) if terms else ()
    return [r.detach() for r in results], list(gradients), watch.rows


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", [*READS, *WHOLE])
def test_same_as_eager(name, options):
    read = READS.get(name) or WHOLE[name]
    model, eager, x = pair(options)
    (new, new_grads, rows), (old, old_grads, _) = (outcome(m, x, read) for m in (model, eager))
    assert rewriter.report(model).sites("linear_cross_entropy")
    for a, b in zip(new, old, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(new_grads) == len(old_grads)
    for a, b in zip(new_grads, old_grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative(a, b) < 1e-5 or (a - b).abs().max() < 1e-6
    assert rows <= 4 if name in READS else rows > 4


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", ["loss", "shifted loss", "loss of floats", "sum", "losses", "weighted"])
def test_a_loss_of_ones_own_is_fused(name, options):
    model, _, x = pair(options)
    _, logits = model(x, TARGET)
    with Watch() as watch:
        READS[name](logits)
    assert torch.ops.rewriter.linear_cross_entropy.default in watch.called


@pytest.mark.parametrize("name", ["argmax", "logsumexp", "loss", "entropy", "log-probabilities", "topk"])
def test_without_gradient(name):
    model, eager, x = pair({})
    model(x, TARGET)
    with torch.no_grad():
        new, old = (results_of(READS[name](m(x, TARGET)[1])) for m in (model, eager))
    for a, b in zip(new, old, strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad
    with torch.no_grad():
        _, logits = model(x, TARGET)
        with Watch() as watch:
            READS[name](logits)
    assert watch.rows <= 4


def test_what_was_picked_without_gradient_has_none():
    model, _, x = pair({})
    _, logits = model(x, TARGET)
    with torch.no_grad():
        picked = logits[:, 1:]
    assert not picked.requires_grad and not (picked + 0).requires_grad and not picked.logsumexp(-1).requires_grad
    assert logits.logsumexp(-1).requires_grad


def test_in_16_bits_closer_to_the_truth():
    model, eager, x = pair({}, torch.bfloat16)
    truth = copy.deepcopy(eager).double()
    values = [
        READS["shifted loss"](m(x.to(p.dtype), TARGET)[1])
        for m in (model, eager, truth)
        if (p := next(m.parameters())) is not None
    ]
    assert values[0].dtype is values[1].dtype is torch.bfloat16
    assert abs(values[0] - values[2]) <= 2 * abs(values[1] - values[2]) + 8e-3


def test_under_autocast():
    model, eager, x = pair({})
    for read in (READS["loss"], READS["entropy"], lambda z: z.softmax(-1).amax(-1)):
        with torch.autocast("cpu", torch.bfloat16):
            new, old = (read(m(x, TARGET)[1]) for m in (model, eager))
        assert new.dtype is old.dtype and relative(new, old) < 2e-2


def test_weights_that_an_optimizer_changes():
    model, eager, x = pair({})
    results = []
    for m in (model, eager):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.5)
        loss, logits = m(x, TARGET)
        some = logits.detach()[:, 2:].float()
        loss.backward()
        optimizer.step()
        results.append((some.argmax(-1), some.logsumexp(-1), logits.detach().amax(-1)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_changed_by_hand_are_an_error():
    model, _, x = pair({})
    _, logits = model(x, TARGET)
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        logits.argmax(-1)


def test_twice_and_after_being_read_whole():
    model, eager, x = pair({})
    results = []
    for m in (model, eager):
        _, z = m(x, TARGET)
        results.append((z.argmax(-1), z.argmax(-1), z + 0, z.argmax(-1), z[:, 1].amax(-1), entropy(z)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_in_inference_mode():
    model, eager, x = pair({})
    model(x, TARGET)
    with torch.inference_mode():
        new, old = (m(x, TARGET)[1].argmax(-1) for m in (model, eager))
    assert torch.equal(new, old)


def test_travels():
    """Pickled, saved and converted, it is the plain tensor."""
    model, eager, x = pair({})
    new, old = (m(x, TARGET)[1].detach() for m in (model, eager))
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    for result in (
        pickle.loads(pickle.dumps(new)),
        torch.load(file),
        torch.from_numpy(new.numpy()),
        copy.deepcopy(new),
    ):
        torch.testing.assert_close(result + 0, old)
