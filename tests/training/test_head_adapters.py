"""Heads that are more than a linear layer: adapters on them, copies that train, weights in 4 bits."""

import copy

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from training.common import assert_trains_alike
from training.models import batches, build

import rewriter

HEAD = ["q_proj", "lm_head"]
STEPS = batches()[:1]  # another length is no matter of heads


def adapted(model, **options):
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                parameter.normal_(0, 0.1)
    return model.train()


def small(name="Llama", **changes):
    return build(name, layers=1, **changes)


def of_loss(report):
    """The rewrites of a loss: [(pattern, why its logits are there)]."""
    return [(r.pattern, r.details.get("logits")) for r in report.rewrites if r.pattern.endswith("cross_entropy")]


@pytest.mark.parametrize(
    "changes, options",
    [
        ({}, {}),
        ({}, {"lora_dropout": 0.2}),
        ({"tie_word_embeddings": True}, {}),
        ({"name": "Gemma2"}, {}),
        ({}, {"target_modules": r".*\.(\w+_proj|lm_head)|lm_head"}),
    ],
    ids=["plain", "dropout", "tied", "softcap", "everywhere"],
)
def test_adapter_on_the_head(changes, options):
    """Its logits are kept, for they are a sum; the loss is fused all the same, and the report says why."""
    model = small(**changes)
    model = adapted(model, **{"target_modules": HEAD, **options})
    *_, report = assert_trains_alike(model, STEPS)
    assert of_loss(report) == [("cross_entropy", "kept: a sum of products")]
    assert "kept: a sum of products" in str(report)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [["lm_head"], ["lm_head", "embed_tokens"]], ids="+".join)
def test_head_that_trains_as_a_whole(saved, tied):
    model = adapted(small(tie_word_embeddings=tied), target_modules=["q_proj"], modules_to_save=saved)
    model, _, report = assert_trains_alike(model, STEPS)
    assert of_loss(report) == [("linear_cross_entropy", None)]
    assert [n for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad]


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_train(tied):
    model = small(tie_word_embeddings=tied)
    model = adapted(model, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    *_, report = assert_trains_alike(model, STEPS)
    assert of_loss(report) == [("linear_cross_entropy", None)]


def test_adapter_that_is_switched_off_and_on():
    """Without its adapter the head is a linear layer again, and so is one that took the adapter in."""
    model = adapted(small(use_cache=False), target_modules=HEAD)
    eager = copy.deepcopy(model)
    rewriter.optimize(model)
    rows = []
    for m in (model, eager):
        with m.disable_adapter():
            off = m(**STEPS[0]).loss
        on = m(**STEPS[0]).loss
        (on + off).backward()
        rows.append((off.detach(), on.detach()))
        assert (on - off).abs() > 1e-3
    torch.testing.assert_close(*rows)
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert {p for p, _ in of_loss(rewriter.report(model))} == {"cross_entropy", "linear_cross_entropy"}


class Quantised(torch.autograd.Function):
    """A product with a frozen weight in 4 bits that is unpacked for it, in forward and again in backward."""

    @staticmethod
    def forward(ctx, x, packed, scale):
        ctx.save_for_backward(packed, scale)
        return x @ unpacked(packed, scale).t()

    @staticmethod
    def backward(ctx, upstream):
        return upstream @ unpacked(*ctx.saved_tensors), None, None


def unpacked(packed, scale):
    return torch.cat((packed >> 4, packed & 15), 1).to(scale.dtype).sub(7.5) * scale


class FourBits(nn.Linear):
    def __init__(self, weight):
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        scale = weight.abs().amax(1, keepdim=True) / 7.5
        high, low = (weight / scale + 7.5).round().clamp(0, 15).to(torch.uint8).chunk(2, 1)
        self.weight = nn.Parameter(high << 4 | low, requires_grad=False)
        self.scale = nn.Buffer(scale)

    def forward(self, x):
        return Quantised.apply(x, self.weight, self.scale)


def in_four_bits(model, library=None):
    weight = model.lm_head.weight.detach()
    if library is None:
        model.lm_head = FourBits(weight)
        return model
    head = library.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32)
    head.weight = library.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    model.lm_head = head.to("cpu")
    return model


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_head_in_four_bits(lora, real):
    """Real ones are known for what they are, others not: the logits are kept, and all gradients are as they were."""
    model = in_four_bits(small(), bitsandbytes if real else None)
    model = adapted(model, target_modules=HEAD if lora and real else ["q_proj"]) if lora else model
    *_, report = assert_trains_alike(model, STEPS)
    ((pattern, why),) = of_loss(report)
    assert pattern == "cross_entropy"
    expected = "a head in 4 bits" if real else "made by autograd_function_apply"
    assert why == "kept: " + ("a sum of products" if lora and real else expected)


def test_logits_that_come_from_elsewhere():
    """No head at all, or one in another graph."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.randn(7, 11))

        def forward(self, target):
            return F.cross_entropy(self.logits, target)

    *_, report = assert_trains_alike(Loss(), [(torch.arange(7),)])
    assert of_loss(report) == [("cross_entropy", "kept: they come into the graph")]
