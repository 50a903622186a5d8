"""The logits of a forward without labels: the loss is the caller's, and so are all values and gradients."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training.common import relative
from training.models import batch, build
from training.test_lazy_rows import Watch

import rewriter
from rewriter.lazy import LazyTensor

B, T, D, V = 2, 9, 8, 50
IDS = torch.arange(B * T).view(B, T) * 7 % V
LABELS = (IDS * 3 + 1).remainder(V).masked_fill(IDS % 5 == 0, -100)
WEIGHT = torch.linspace(0.1, 2, V)
TEACHER = torch.randn(B, T, V, generator=torch.Generator().manual_seed(1)).softmax(-1)
FUSED = torch.ops.rewriter.linear_cross_entropy.default


class Model(nn.Module):
    def __init__(self, tied=False, frozen=False, bias=False, cap=0.0, scale=1.0, product=False, shape="bare", few=0):
        super().__init__()
        self.embed, self.body = nn.Embedding(V, D), nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.head = nn.Linear(D, few or V, bias)
        self.cap, self.scale, self.product, self.shape = cap, scale, product, shape
        if tied:
            self.head.weight = self.embed.weight
        if frozen:
            self.head.weight.requires_grad_(False)

    def logits(self, ids):
        h = self.body(self.embed(ids))
        z = h @ self.head.weight.T if self.product else self.head(h)
        z = z * self.scale if self.scale != 1 else z
        return self.cap * torch.tanh(z / self.cap) if self.cap else z

    def forward(self, ids):
        z = self.logits(ids)
        return {"bare": z, "tuple": (z, ids), "dict": {"logits": z, "ids": ids}, "float": z.float()}[self.shape]


MODELS = {
    "untied": {}, "tied": dict(tied=True), "frozen": dict(frozen=True), "bias": dict(bias=True),
    "softcap": dict(cap=2.0), "scale": dict(scale=0.3), "all": dict(tied=True, bias=True, cap=2.0, scale=3.0),
    "product": dict(product=True, tied=True),
}  # fmt: skip
CE = F.cross_entropy
LOSSES = {
    "shifted": lambda z: CE(z[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()),
    "contiguous": lambda z: CE(z[..., :-1, :].contiguous().view(-1, V), LABELS[..., 1:].contiguous().view(-1)),
    "reshaped floats": lambda z: CE(z.float()[:, :-1].reshape(-1, V), LABELS[:, 1:].reshape(-1), reduction="sum") / 9,
    "turned": lambda z: CE(z.transpose(1, 2), LABELS),
    "turned, one by one": lambda z: CE(z[:, 1:].permute(0, 2, 1), LABELS[:, 1:], reduction="none").sin().sum(),
    "smoothed": lambda z: nn.CrossEntropyLoss(label_smoothing=0.2)(z.view(-1, V), LABELS.view(-1)),
    "ignoring": lambda z: CE(z.view(-1, V), IDS.view(-1), ignore_index=7),
    "weights": lambda z: CE(z.view(-1, V), LABELS.view(-1), WEIGHT, label_smoothing=0.1),
    "each": lambda z: CE(z.flatten(0, 1), LABELS.flatten(), reduction="none").square().mean(),
}
USES = {
    "distillation": lambda z: F.kl_div(z.log_softmax(-1), TEACHER, reduction="batchmean"),
    "softmax": lambda z: (z.softmax(-1) * TEACHER).square().sum(),
    "log-probabilities": lambda z: -z.log_softmax(-1).gather(-1, IDS[..., None]).mean(),
    "accuracy and loss": lambda z: (z.argmax(-1) == IDS).float().mean() + LOSSES["shifted"](z),
    "two losses": lambda z: LOSSES["shifted"](z) + 0.5 * z.logsumexp(-1).square().mean(),
    "squares": lambda z: z.square().mean() + LOSSES["smoothed"](z),
    "smoother": lambda z: smoother(z[..., :-1, :].contiguous(), LABELS[..., 1:].contiguous()),
    "divided in place": lambda z: LOSSES["shifted"](z.div_(0.7)) + z.sin().mean(),
    "view written": lambda z: written_through_view(z),
    "one position set": lambda z: masked(z),
}


WRITES = ("divided in place", "view written", "one position set")


def smoother(z, labels):
    """As the Trainer's label smoother has it."""
    logs, labels = -F.log_softmax(z, dim=-1), labels.unsqueeze(-1)
    padding, labels = labels.eq(-100), labels.clamp(min=0)
    loss = logs.gather(dim=-1, index=labels).masked_fill(padding, 0.0)
    smooth = logs.sum(dim=-1, keepdim=True, dtype=torch.float32).masked_fill(padding, 0.0)
    return 0.9 * loss.sum() / 10 + 0.1 * smooth.sum() / (10 * V)


def written_through_view(z):
    early = z[:, 1:]
    z[:, -1].mul_(3)
    return LOSSES["shifted"](z) + early.sin().sum() + early.logsumexp(-1).sum()


def masked(z):
    last = z.view(-1, V)
    last[:, 4] = -5.0
    return last.softmax(-1).square().sum() + LOSSES["shifted"](z)


def pair(**options):
    torch.manual_seed(0)
    eager = Model(**options)
    return rewriter.optimize(copy.deepcopy(eager)), eager


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters()}


def assert_equal_gradients(new, old, tolerance=1e-5):
    new, old = gradients(new), gradients(old)
    assert any(g is not None for g in old.values())
    for name, g in old.items():
        assert (new[name] is None) == (g is None), name
        assert g is None or relative(new[name], g) < tolerance or (new[name] - g).abs().max() < 1e-7, name


def assert_same(loss, **options):
    model, eager = pair(**options)
    values = []
    for m in (model, eager):
        value = loss(m(IDS))
        value.backward()
        values.append(value.detach())
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    assert_equal_gradients(model, eager)
    return model


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_cross_entropy_is_fused(name, options):
    model = assert_same(LOSSES[name], **options)
    z = model(IDS)
    assert type(z) is LazyTensor
    with Watch() as watch:
        LOSSES[name](z).backward()
    assert FUSED in watch.called and watch.rows <= 1  # a gradient of the bias has as many numbers


@pytest.mark.parametrize("options", [MODELS["untied"], MODELS["all"]], ids=["untied", "all"])
@pytest.mark.parametrize("name", USES)
def test_whatever_else_is_done(name, options):
    model = assert_same(USES[name], **options)
    assert type(model(IDS)) is LazyTensor


def test_looks_like_the_tensor():
    for shape, take in {"bare": lambda o: o, "tuple": lambda o: o[0], "dict": lambda o: o["logits"]}.items():
        model, eager = pair(shape=shape)
        new, old = take(model(IDS)), take(eager(IDS))
        assert type(new) is LazyTensor
        for what in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "layout"):
            assert getattr(new, what) == getattr(old, what), what
        assert new.stride() == old.stride() and new[:, 1:].stride() == old[:, 1:].stride()
        assert new[:, 1:].is_contiguous() == old[:, 1:].is_contiguous()
        LOSSES["shifted"](new).backward()
        LOSSES["shifted"](old).backward()
        assert_equal_gradients(model, eager)


def test_report_says_so_and_restore_undoes_it():
    model, eager = pair()
    model(IDS)
    report = rewriter.report(model)
    assert [(d.sites, d.classes, d.width) for d in report.on_demand] == [(("head",), V, D)]
    assert "Logits without a loss" in str(report) and "1 result on demand" in str(report)
    assert rewriter.explain(eager)(IDS).on_demand == report.on_demand
    assert type(rewriter.restore(model)(IDS)) is torch.Tensor
    excluded = rewriter.optimize(model, exclude=("linear_cross_entropy",))
    assert type(excluded(IDS)) is torch.Tensor and not rewriter.report(excluded).on_demand


def test_few_classes_stay():
    model, _ = pair(few=10)
    assert type(model(IDS)) is torch.Tensor and not rewriter.report(model).on_demand


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(D, 8 * D), nn.LayerNorm(D)

    def forward(self, x):
        return self.up(self.norm(x))


class Blocks(nn.Module):
    """Long rows leave blocks, and a function that Dynamo can't take along."""

    def __init__(self, breaks=False):
        super().__init__()
        self.layers, self.head, self.breaks = nn.ModuleList(Block() for _ in range(2)), nn.Linear(D, V), breaks

    def forward(self, x):
        for layer in self.layers:
            long = layer(x)
            assert type(long) is torch.Tensor
            x = x + long.tanh().view(*x.shape, 8).sum(-1)
        z = self.head(x)
        if self.breaks:
            torch._dynamo.graph_break()
            assert type(z) is torch.Tensor
        return z


@pytest.mark.parametrize("breaks", [False, True])
def test_only_where_the_outermost_forward_ends(breaks):
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(D, D), Blocks(breaks))
    model = rewriter.optimize(copy.deepcopy(eager))
    for m in (model, eager):
        for _ in range(2):
            LOSSES["shifted"](m(torch.ones(B, T, D))).backward()
    assert_equal_gradients(model, eager)


def test_optimizer_step_between_forward_and_use():
    """What eager's backward refuses, since a weight was written, has the gradients of the weights at the forward."""
    model, eager = pair()
    results = []
    for m in (model, eager):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.5)
        LOSSES["shifted"](m(IDS)).backward()
        z = m(IDS)
        if m is eager:
            value = LOSSES["smoothed"](z)
            value.backward()
        optimizer.step()
        if m is model:
            value = LOSSES["smoothed"](z)
        results.append((z.argmax(-1), value.detach(), z.detach() + 0))
    for new, old in zip(*results, strict=True):
        torch.testing.assert_close(new, old)
    value = LOSSES["smoothed"](model(IDS))  # and after the step: those of the new weights
    head, model_again = model.head.weight, copy.deepcopy(model)
    (wanted,) = torch.autograd.grad(LOSSES["smoothed"](rewriter.restore(model_again)(IDS)), [model_again.head.weight])
    optimizer = torch.optim.SGD([head], lr=0.5)
    z, head.grad = model(IDS), torch.ones_like(head)
    optimizer.step()
    (found,) = torch.autograd.grad(LOSSES["smoothed"](z), [head])
    torch.testing.assert_close(found, wanted)
    assert value.requires_grad


def test_backward_twice():
    model, eager = pair(bias=True)
    for m in (model, eager):
        z = m(IDS)
        loss = LOSSES["shifted"](z)
        loss.backward(retain_graph=True)
        (2 * loss).backward(retain_graph=True)
        z.square().mean().backward()
    assert_equal_gradients(model, eager)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(reentrant):
    model, eager = pair(bias=True)
    probe = torch.zeros((), requires_grad=True)
    for name, loss in {**LOSSES, **USES}.items():
        if reentrant and name in WRITES:
            continue  # eager refuses them
        for m in (model, eager):
            m.zero_grad()
            z = checkpoint(lambda p, m=m: m(IDS), probe, use_reentrant=reentrant)
            value = loss(z)
            value.backward()
        assert_equal_gradients(model, eager), name


def test_autocast():
    model, eager = pair(bias=True)
    for inside in (True, False):
        losses = []
        for m in (model, eager):
            m.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                z = m(IDS)
                loss = LOSSES["shifted"](z) if inside else None
            loss = LOSSES["shifted"](z) if loss is None else loss
            loss.float().backward()
            losses.append((z.dtype, loss.dtype, loss.detach().float()))
        assert losses[0][:2] == losses[1][:2]
        assert abs(losses[0][2] - losses[1][2]) < 2e-2
        assert_equal_gradients(model, eager, 3e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient(mode):
    model, eager = pair(cap=2.0)
    model(IDS)
    with mode():
        new, old = model(IDS), eager(IDS)
        assert type(new) is LazyTensor and not new.requires_grad
        torch.testing.assert_close(LOSSES["shifted"](new), LOSSES["shifted"](old))
        assert torch.equal(new.argmax(-1), old.argmax(-1))
        torch.testing.assert_close(new + 0, old)


def test_saved():
    model, eager = pair(shape="dict")
    new, old = ({k: v.detach() for k, v in m(IDS).items()} for m in (model, eager))
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    for loaded in (torch.load(file), pickle.loads(pickle.dumps(new))):
        torch.testing.assert_close(loaded["logits"] + 0, old["logits"])


@pytest.mark.parametrize("kind", ["forward", "backward", "pre"])
def test_a_hook_on_the_head(kind):
    model, eager = pair()
    calls = []
    for m in (model, eager):
        if kind == "forward":
            m.head.register_forward_hook(lambda module, args, out: out * 2 + 1)
        elif kind == "pre":
            m.head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        else:
            m.head.register_full_backward_hook(lambda module, *g, m=m: calls.append(m))
        LOSSES["shifted"](m(IDS)).backward()
    assert_equal_gradients(model, eager)
    assert kind != "backward" or calls == [model, eager]


def test_a_loss_that_is_compiled():
    def loss(z):
        return CE(z[:, :-1].flatten(0, 1).float(), LABELS[:, 1:].flatten())

    assert_same(torch.compile(loss, backend="aot_eager"), bias=True)


def test_second_derivatives():
    model, eager = pair()
    for m in (model, eager):
        (first,) = torch.autograd.grad(m(IDS).logsumexp(-1).sum(), [m.head.weight], create_graph=True)
        first.square().sum().backward()
    assert_equal_gradients(model, eager)


def test_under_functorch():
    model, eager = pair()
    found = []
    for m in (model, eager):
        parameters = {n: p.detach() for n, p in m.named_parameters()}

        def loss(p, m=m):
            return LOSSES["shifted"](torch.func.functional_call(m, p, (IDS,)))

        found.append(torch.func.grad(loss)(parameters))
    for name, old in found[1].items():
        torch.testing.assert_close(found[0][name], old)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_training_loop_and_generation(name):
    model = build(name)
    eager = copy.deepcopy(model)
    rewriter.optimize(model)
    inputs = batch((2, 16))
    labels = inputs.pop("labels")
    for m in (model, eager):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
        for _ in range(2):
            logits = m(**inputs).logits
            assert (type(logits) is LazyTensor) == (m is model)
            F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
            if _ == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert_equal_gradients(model, eager)
    new, old = (m.eval().generate(inputs["input_ids"], max_new_tokens=4, do_sample=False) for m in (model, eager))
    assert torch.equal(new, old)
