"""Weights in 4 bits train as in eager, alone and below adapters; those in 8 bits stay as they are."""

import contextlib
import copy
import functools

import bitsandbytes
import peft
import pytest
import torch
from torch import nn
from training.common import assert_trains_alike, near_truth
from training.models import batch, build, with_lora
from training.quantised import exact, in_4_bits, in_8_bits

import rewriter
from rewriter import decisions

LENGTHS = [batch((2, 16)), batch((3, 24), 1)]
STEPS = LENGTHS[:1]
EXCLUDED = [[], ["lora"]]


@pytest.fixture
def everywhere(monkeypatch):
    """Weights in 4 bits are unpacked by ours on a CPU too, which otherwise leaves them to bitsandbytes."""
    monkeypatch.setattr(decisions, "DECISIONS", ())


def base(kind="Qwen2", **changes):
    return build(kind, use_cache=False, intermediate_size=128, **changes)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_layers_alone(quant_type, nested, everywhere):
    """Norms and biases train through frozen layers in 4 bits."""
    model = in_4_bits(base(), quant_type=quant_type, nested=nested)
    *_, report = assert_trains_alike(model, STEPS)
    assert report.coverage()["linear_4bit"] == (14, 14)
    assert report.rewrites[0].verified
    details = [r.details for r in report.rewrites if r.pattern == "linear_4bit"]
    assert {(d["type"], d["nested"]) for d in details} == {(quant_type, nested)}


@pytest.mark.parametrize("nested, dropout, steps", [(False, 0.0, STEPS), (False, 0.1, STEPS), (True, 0.1, LENGTHS)])
def test_adapters(nested, dropout, steps, everywhere):
    model = with_lora(in_4_bits(base(), nested=nested), dropout)
    *_, report = assert_trains_alike(model, steps)
    assert report.coverage()["lora"] == (14, 14)
    assert not report.sites("linear_4bit") and not report.near_misses


def test_adapters_without_their_pattern(everywhere):
    *_, report = assert_trains_alike(with_lora(in_4_bits(base())), LENGTHS, options={"exclude": ["lora"]})
    assert report.coverage()["linear_4bit"] == (14, 14)


@pytest.mark.parametrize("exclude", EXCLUDED)
def test_checkpointing(exclude, everywhere):
    model = in_4_bits(base())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    *_, report = assert_trains_alike(with_lora(model, 0.1), STEPS, options={"exclude": exclude})
    assert report.sites("linear_4bit" if exclude else "lora")


@pytest.mark.parametrize(
    "adapter, autocast, exclude",
    [
        (torch.float32, True, []),
        (torch.float32, False, ["lora"]),
        (torch.bfloat16, False, []),
        (torch.bfloat16, True, ["lora"]),
        (torch.bfloat16, True, []),
    ],
)
def test_bfloat16(adapter, autocast, exclude, everywhere):
    """As near to float64 with the weights that bitsandbytes unpacks as eager is."""
    model = with_lora(in_4_bits(base().bfloat16(), compute=torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    context = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=autocast)
    report = as_near_to_the_truth(model, context, 8e-3, exclude=exclude)
    assert report.sites("linear_4bit" if exclude else "lora")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_in_another_dtype_than_the_models(dtype, everywhere):
    model = with_lora(in_4_bits(base(), compute=dtype))
    report = as_near_to_the_truth(model, contextlib.nullcontext, 8e-3)
    assert report.sites("lora")


@pytest.mark.parametrize("kind, autocast", [("Llama", False), ("Qwen2", True)])
def test_prepared_by_peft(kind, autocast, everywhere):
    """Norms, hidden states and adapters in float32, layers in bfloat16, each with a cast of its own; checkpointed."""
    model = in_4_bits(base(kind).bfloat16(), compute=torch.bfloat16)
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = with_lora(model)
    with torch.no_grad():
        model(**STEPS[0])  # bitsandbytes' first forward changes the dtype of biases, which Dynamo can't follow
    context = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=autocast)
    report = as_near_to_the_truth(model, context, 8e-3)
    assert report.coverage()["lora"] == (14, 14)
    assert 3 in {r.details["layers"] for r in report.rewrites if r.pattern == "lora"}  # those of one input are one call
    assert not report.near_misses


def as_near_to_the_truth(model, context, floor, **options):
    return rewriter.report(near_truth(model, STEPS, context, floor, exact(model), options))


@pytest.mark.parametrize("exclude", EXCLUDED)
def test_inference(exclude, everywhere):
    """Keeps the library's operators, which are made for few tokens."""
    model = with_lora(in_4_bits(base()))
    eager = copy.deepcopy(model).eval()
    model = rewriter.optimize(model, exclude=exclude).eval()
    with torch.no_grad():
        new, old = (m(**STEPS[0]).logits for m in (model, eager))
    torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)
    report = rewriter.report(model)
    assert not {r.pattern for r in report.rewrites} & {"linear_4bit", "lora"} and not report.near_misses


def test_adapter_is_saved_and_loaded(tmp_path, everywhere):
    model, eager, _ = assert_trains_alike(with_lora(in_4_bits(base())), STEPS)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(in_4_bits(base()), tmp_path).eval()
    with torch.no_grad():
        new, old = (m(**STEPS[0]).logits for m in (loaded, eager.eval()))
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_state_dict_and_restore(everywhere):
    model = in_4_bits(base())
    keys, was = list(model.state_dict()), model(**STEPS[0]).loss
    rewriter.optimize(model)
    model(**STEPS[0]).loss.backward()
    assert list(model.state_dict()) == keys
    assert rewriter.restore(model)(**STEPS[0]).loss == was


def test_excluded(everywhere):
    model = in_4_bits(base())
    *_, report = assert_trains_alike(model, STEPS, options={"exclude": ["linear_4bit"]})
    assert "linear_4bit" not in report.coverage() and report.sites("rms_norm")


@pytest.mark.parametrize("exclude", EXCLUDED)
def test_on_a_cpu_they_stay(exclude):
    model = with_lora(in_4_bits(base()))
    *_, report = assert_trains_alike(model, STEPS, options={"exclude": exclude})
    assert not {r.pattern for r in report.rewrites} & {"linear_4bit", "lora"}
    assert "its library's operator" in str(report)
    assert not report.near_misses


@pytest.mark.parametrize("exclude", EXCLUDED)
def test_8_bits_stay(exclude, everywhere):
    model = with_lora(in_8_bits(base()))
    *_, report = assert_trains_alike(model, STEPS, options={"exclude": exclude})
    assert not report.sites("linear_4bit") and report.sites("rms_norm")


# --- the same operators, written otherwise


class Written(torch.autograd.Function):
    """bitsandbytes before 0.50: an operator unpacks, and the product is PyTorch's. factor: of the gradient alone."""

    @staticmethod
    def forward(ctx, x, packed, bias, state, factor):
        ctx.state, ctx.factor, ctx.bias = state, factor, bias is not None
        ctx.packed = packed
        weight = bitsandbytes.functional.dequantize_4bit(packed, state)
        return nn.functional.linear(x, weight.to(x.dtype).t(), bias)

    @staticmethod
    def backward(ctx, upstream):
        weight = bitsandbytes.functional.dequantize_4bit(ctx.packed, ctx.state).to(upstream.dtype)
        dbias = upstream.sum((0, 1)) if ctx.bias else None
        return ctx.factor * (upstream @ weight.t()), None, dbias, None, None


class Older(nn.Module):
    def __init__(self, nested=True, bias=True, factor=1.0, width=64, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.factor = nn.Linear(8, width), factor
        weight = torch.randn(48, width).to(dtype)
        packed, self.state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
        self.packed, self.bias = nn.Parameter(packed, requires_grad=False), nn.Parameter(torch.randn(48))
        if not bias:
            self.bias = None

    def forward(self, x):
        y = Written.apply(torch.tanh(self.first(x)), self.packed.t(), self.bias, self.state, self.factor)
        return torch.sin(y).square().mean()


INPUTS = [(torch.randn(2, n, 8, generator=torch.Generator().manual_seed(n)),) for n in (5, 7)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_older_operators(bias, nested, everywhere):
    *_, report = assert_trains_alike(Older(nested, bias), INPUTS)
    assert report.coverage()["linear_4bit"] == (1, 1)


def test_another_backward_than_the_forwards_derivative_stays(everywhere):
    *_, report = assert_trains_alike(Older(factor=0.5), INPUTS)
    assert report.coverage()["linear_4bit"] == (0, 1)
    assert "not what its forward says" in report.near_misses[0].reason


def test_what_bitsandbytes_unpacks_otherwise_stays(everywhere):
    """Its code for AVX512 begins a block with every row: whatever a model computes, it goes on computing."""
    *_, report = assert_trains_alike(Older(width=96), INPUTS)
    done, seen = report.coverage()["linear_4bit"]
    assert seen == 1
    assert done or "verification" in report.near_misses[0].reason
