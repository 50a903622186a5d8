"""Heads that are more than a linear layer: adapters on them, copies that train, weights in 4 bits."""

import copy
import functools

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from training.common import assert_same_gradients, assert_trains_alike, near_truth, step
from training.models import batches, build
from training.test_lazy_rows import Watch

import rewriter
from rewriter import decisions
from rewriter.lazy import LazyTensor

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


def of_head(report):
    """Details of the one loss that was fused with its head."""
    (found,) = [r for r in report.rewrites if r.pattern.endswith("cross_entropy")]
    assert found.pattern == "linear_cross_entropy" and not report.near_misses
    return found.details


@pytest.mark.parametrize(
    "changes, options",
    [
        ({}, {}),
        ({}, {"lora_dropout": 0.2}),
        ({"tie_word_embeddings": True}, {}),
        ({"name": "Gemma2"}, {}),
        ({}, {"target_modules": r".*\.(\w+_proj|lm_head)|lm_head"}),
        ({}, {"use_rslora": True, "lora_bias": True}),
        ({}, {"modules_to_save": ["embed_tokens"]}),
    ],
    ids=["plain", "dropout", "tied", "softcap", "everywhere", "bias", "embedding trains"],
)
def test_adapter_on_the_head(changes, options):
    """It is added to each chunk of logits, of which there are never all at once."""
    model = small(**changes)
    model = adapted(model, **{"target_modules": HEAD, **options})
    *_, report = assert_trains_alike(model, STEPS)
    details = of_head(report)
    assert details["rank"] == 4 and details["scale"] == (4.0 if "lora_bias" in options else 2.0)
    assert not [site for site in report.sites("lora") if "lm_head" in site]


def test_weight_decomposed_adapter():
    """DoRA's norm of the whole weight: its logits are kept, and the report says why."""
    *_, report = assert_trains_alike(adapted(small(), target_modules=HEAD, use_dora=True), STEPS)
    ((pattern, why),) = of_loss(report)
    assert pattern == "cross_entropy" and why.startswith("kept: ") and why in str(report)


PRECISIONS = {
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
    "as PEFT has it": (torch.bfloat16, torch.float32, False),
    "autocast": (torch.float32, torch.float32, True),
    "autocast of bfloat16": (torch.bfloat16, torch.float32, True),
}


@pytest.mark.parametrize("name, precision", [*(("Llama", p) for p in PRECISIONS), ("Gemma2", "as PEFT has it")])
def test_precision(name, precision):
    dtype, adapter, autocast = PRECISIONS[precision]
    model = adapted(small(name).to(dtype), target_modules=HEAD)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(adapter)
    context = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
    assert of_head(rewriter.report(near_truth(model, STEPS, context, 2e-2)))["rank"] == 4


def test_two_adapters_at_once():
    model = adapted(small(), target_modules=HEAD)
    torch.manual_seed(2)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=9, target_modules=HEAD))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "second" in name:
                parameter.normal_(0, 0.1)
    model.base_model.set_adapter(["default", "second"])
    details = of_head(assert_trains_alike(model, STEPS)[2])
    assert (details["rank"], details["adapters"]) == (7, 2)


def test_mean_over_several_batches():
    """As the Trainer accumulates: the sum over the number of all tokens that count."""
    model = adapted(small(), target_modules=HEAD)
    steps = [{**batch, "num_items_in_batch": torch.tensor(41)} for batch in STEPS]
    assert of_head(assert_trains_alike(model, steps)[2])["reduction"] == "sum"


@pytest.mark.parametrize("read", ["own loss", "entropy", "whole"])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_logits_on_demand(dropout, labels, read):
    """Exact, with a loss beside them or none; by a dropout, only with one, and as a whole."""
    vocabulary, batch = STEPS[0]["input_ids"].max() + 1, STEPS[0]
    shifted = batch["labels"][:, 1:].flatten() % vocabulary
    reads = {
        "own loss": lambda z: F.cross_entropy(z[:, :-1].flatten(0, 1), shifted),
        "entropy": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
        "whole": lambda z: z.sin().mean(),
    }
    model = adapted(small(), target_modules=HEAD, lora_dropout=dropout)
    eager = copy.deepcopy(model)
    rewriter.optimize(model)
    for m in (model, eager):
        torch.manual_seed(3)
        outputs = m(**{k: v for k, v in batch.items() if labels or k != "labels"})
        loss = reads[read](outputs.logits)
        (loss + outputs.loss if labels else loss).backward()
        assert (type(outputs.logits) is LazyTensor) == (m is model and (labels or not dropout))
    assert_same_gradients(model, eager)
    assert bool(rewriter.report(model).on_demand) == (not labels and not dropout)


def test_own_loss_of_an_adapted_head_is_fused():
    model = rewriter.optimize(adapted(small(), target_modules=HEAD))
    logits = model(STEPS[0]["input_ids"]).logits
    with Watch() as watch:
        F.cross_entropy(logits.flatten(0, 1), STEPS[0]["labels"].flatten()).backward()
    assert torch.ops.rewriter.linear_cross_entropy.default in watch.called


def test_saved_merged_and_unloaded(tmp_path):
    model = adapted(small(use_cache=False), target_modules=HEAD)
    eager = copy.deepcopy(model)
    rewriter.optimize(model)
    for m in (model, eager):
        step(m, STEPS[0])
    assert_same_gradients(model, eager)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(small(use_cache=False), tmp_path)
    with torch.no_grad():
        expected = eager(**STEPS[0])
        for m in (model, again, model.merge_and_unload()):
            outputs = m(**STEPS[0])
            torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(outputs.logits + 0, expected.logits, rtol=1e-4, atol=1e-4)


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
    report = rewriter.report(model)
    assert [p for p, _ in of_loss(report)] == ["linear_cross_entropy"] * 2
    assert ["rank" in r.details for r in report.rewrites if r.pattern == "linear_cross_entropy"] == [False, True]


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


def in_four_bits(model, library=None, nested=False):
    weight = model.lm_head.weight.detach()
    if library is None:
        model.lm_head = FourBits(weight)
        return model
    head = library.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32)
    head.weight = library.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
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


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_head_in_four_bits_unpacked_by_ours(lora, nested, monkeypatch):
    """It is unpacked for the call alone; the logits, if somebody wants them, are the library's."""
    monkeypatch.setattr(decisions, "DECISIONS", ())
    model = in_four_bits(small(), bitsandbytes, nested)
    model = adapted(model, target_modules=HEAD) if lora else model
    model, eager, report = assert_trains_alike(model, STEPS)
    details = of_head(report)
    assert details["type"] == "nf4" and details.get("rank") == (4 if lora else None)
    for m in (model, eager):
        m.zero_grad()
        outputs = m(**STEPS[0])
        (outputs.loss + outputs.logits.square().mean()).backward()
    assert_same_gradients(model, eager)


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
