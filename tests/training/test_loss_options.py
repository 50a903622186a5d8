"""Every combination of what models do between the last hidden states and the loss: found, and right by the rule."""

import copy
import dataclasses
from contextlib import nullcontext

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_near_truth
from torch import nn
from torch.nn import functional as F

import rewriter

B, T, D, V = 2, 9, 16, 23
BATCHES = (4, 40)  # judged together; more where that fails: the last bit of few numbers is luck


@dataclasses.dataclass(frozen=True)
class Options:
    """One way to write the tail; the first of the choices in `tails` are the plainest."""

    head: str
    frozen: bool
    dtype: str
    shift: str
    scale: str
    softcap: str
    upcast: bool
    layout: str
    reduction: str
    smoothing: float
    class_weight: bool
    ignore_index: int
    ignored: str


@st.composite
def tails(draw):
    def pick(*options):
        return draw(st.sampled_from(options))

    return Options(
        pick("linear", "bias", "tied", "matmul"), pick(False, True), pick("float32", "bfloat16", "autocast"),
        pick("none", "logits", "labels", "hidden"), pick("none", "hidden", "times", "over", "tensor"),
        pick("none", "plain", "float32"), pick(False, True), pick("rows", "classes second"),
        pick("mean", "sum", "sum / items", "sum / count", "none"), pick(0.0, 0.1), pick(False, True),
        pick(-100, 0), pick("some", "none", "all"),
    )  # fmt: skip


class Tail(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options
        self.embedding, self.body = nn.Embedding(V, D), nn.Linear(D, D)
        if options.head == "matmul":
            self.weight = nn.Parameter(torch.randn(D, V) / 4)
        else:
            self.head = nn.Linear(D, V, bias=options.head == "bias")
        if options.head == "tied":
            self.head.weight = self.embedding.weight
        self.temperature = nn.Parameter(torch.tensor(1.3))
        self.register_buffer("class_weight", torch.linspace(0.5, 2, V))
        if options.frozen:
            for parameter in [self.weight] if options.head == "matmul" else self.head.parameters():
                parameter.requires_grad_(False)

    def forward(self, ids, labels, items):
        o = self.options
        h = self.body(self.embedding(ids)).tanh()
        h = h * 0.7 if o.scale == "hidden" else h
        h = h[:, :-1] if o.shift == "hidden" else h
        z = h @ self.weight if o.head == "matmul" else self.head(h)
        if o.scale in ("times", "over", "tensor"):
            z = z * 0.7 if o.scale == "times" else z / 1.7 if o.scale == "over" else z * self.temperature
        if o.softcap != "none":
            z = torch.tanh((z.float() if o.softcap == "float32" else z) / 3.0) * 3.0
        z = z.float() if o.upcast else z
        if o.shift == "logits":
            z = z[..., :-1, :].contiguous()
        if o.shift in ("logits", "hidden"):
            labels = labels[..., 1:].contiguous()
        elif o.shift == "labels":
            labels = F.pad(labels, (0, 1), value=o.ignore_index)[..., 1:].contiguous()
        given = (z.view(-1, V), labels.view(-1)) if o.layout == "rows" else (z.transpose(1, 2), labels)
        loss = F.cross_entropy(
            *given,
            weight=self.class_weight.to(z.dtype) if o.class_weight else None,
            ignore_index=o.ignore_index,
            label_smoothing=o.smoothing,
            reduction=o.reduction.split()[0],
        )
        if o.reduction == "sum / items":
            return loss / items
        if o.reduction == "sum / count":
            return loss / (labels != o.ignore_index).sum()
        return (loss * torch.arange(loss.numel()).view_as(loss)).mean() if o.reduction == "none" else loss


def batch(options, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, T), generator=generator)
    share = {"some": 0.3, "none": -1, "all": 2}[options.ignored]
    labels = ids.masked_fill(torch.rand(B, T, generator=generator) < share, options.ignore_index)
    return ids, labels, torch.tensor(11)


def outcomes(model, options, seeds, context=nullcontext):
    """[loss, gradients of the parameters that have one] for each batch, and their names."""
    rows = []
    for seed in range(seeds):
        model.zero_grad()
        with context():
            loss = model(*batch(options, seed))
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        rows.append({"loss": loss.detach(), **grads})
    return rows


def check(options):
    torch.manual_seed(0)
    eager = Tail(options).to(torch.bfloat16 if options.dtype == "bfloat16" else torch.float32)
    exact = copy.deepcopy(eager).double()
    # `.float()` in float64 would round the truth
    exact.options = dataclasses.replace(options, upcast=False, softcap=options.softcap.replace("float32", "plain"))
    model = rewriter.optimize(copy.deepcopy(eager))
    autocast = options.dtype == "autocast"
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else nullcontext
    floor = torch.float32 if options.dtype == "float32" else torch.bfloat16

    def judge(seeds):
        new, old = (outcomes(m, options, seeds, context) for m in (model, eager))
        truth = outcomes(exact, options, seeds)
        for name in old[0] | new[0]:
            tensors = [torch.stack([row[name] for row in rows]) for rows in (new, old, truth)]
            if torch.isfinite(tensors[1]).all():
                assert_near_truth(*tensors, name, floor)
            else:
                torch.testing.assert_close(*tensors[:2], equal_nan=True)

    try:
        judge(BATCHES[0])
    except AssertionError:
        judge(BATCHES[1])
    report = rewriter.report(model)
    if options.scale == "tensor" and (options.softcap != "none" or options.dtype != "float32"):
        return  # a learned scale under a cap is no pattern; in 16 bits its gradient often fails the verification
    assert report.coverage().get("linear_cross_entropy") == (1, 1), str(report)


@settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tails())
def test_every_combination(options):
    torch._dynamo.reset()
    check(options)
