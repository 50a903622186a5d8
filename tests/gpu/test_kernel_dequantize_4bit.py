"""Weights in 4 bits on a GPU: unpacked bit for bit as bitsandbytes does it, and models that train on them."""

import copy

import pytest
import torch
from numerics import BEHAVIOURS, FLOOR, compiles_inductor, fakes, strided

import rewriter
from rewriter.kernels.dequantize_4bit import CODES, dequantize_4bit
from rewriter.kernels.linear_4bit import linear_4bit

bitsandbytes = pytest.importorskip("bitsandbytes")

from packed import quantized, random_packed, unpacked  # noqa: E402
from training.models import batch, build, with_lora  # noqa: E402
from training.quantised import exact, in_4_bits  # noqa: E402

# PyTorch's autograd thread has no CUDA context until something makes it: harmless, and said once by torch 2.11.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", [(1024, 1536), (300, 640), (33, 77), (7, 5), (1, 4099), (5, 12345)])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_bitsandbytes(dtype, quant_type, nested, blocksize, shape):
    matrix = torch.randn(shape, device="cuda").to(dtype)
    weight, theirs = quantized(matrix, quant_type, nested, blocksize)
    expected = bitsandbytes.functional.dequantize_4bit(*theirs)
    found = dequantize_4bit(weight)
    assert found.dtype is dtype and torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (129, 64), (64, 96)])
@pytest.mark.parametrize("blocksize", [2, 32, 64, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_formula(nested, blocksize, shape):
    for dtype in DTYPES:
        weight = random_packed(shape, "fp4", nested, blocksize, device="cuda")
        assert torch.equal(dequantize_4bit(weight, dtype), unpacked(weight, dtype))


def test_more_than_2_to_31_numbers():
    """The last rows are what they are alone."""
    shape = (36000, 65536)
    packed = torch.randint(0, 256, (shape[0] * shape[1] // 2, 1), dtype=torch.uint8, device="cuda")
    weight = random_packed((16, shape[1]), device="cuda")
    absmax = torch.rand(shape[0] * shape[1] // 64, device="cuda")
    whole = weight._replace(packed=packed, absmax=absmax, shape=shape, dtype=torch.bfloat16)
    last = weight._replace(packed=packed[-8 * shape[1] :], absmax=absmax[-shape[1] // 4 :], dtype=torch.bfloat16)
    assert torch.equal(dequantize_4bit(whole)[-16:], unpacked(last))


@pytest.mark.parametrize("behaviour", [*(b for b in BEHAVIOURS if b is not fakes), compiles_inductor])
def test_behaviour(behaviour):
    weight = random_packed((48, 64), nested=True, device="cuda")
    inputs = [strided(48, device="cuda", seed=1)]
    behaviour(lambda x, bias: linear_4bit(x, weight, bias), lambda n: [strided(2, n, 64, device="cuda"), *inputs])


def step(model, length):
    model.zero_grad()
    inputs = {name: tensor.to("cuda") for name, tensor in batch((2, length), length).items()}
    loss = model(**inputs).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def qlora(nested, compute, adapter):
    model = build("Qwen2", hidden_size=256, intermediate_size=512, head_dim=64, use_cache=False)
    model = with_lora(in_4_bits(model.to("cuda", compute), nested=nested, compute=compute))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to("cuda", adapter)
    return model


@pytest.mark.parametrize("executor", ["eager", "inductor"])
@pytest.mark.parametrize("exclude", [[], ["lora"]])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_model_trains_as_near_to_the_truth_as_eager(dtypes, nested, exclude, executor):
    eager = qlora(nested, *dtypes)
    model, truth = copy.deepcopy(eager), exact(eager)
    rewriter.optimize(model, exclude=exclude, executor=executor)
    for length in (64, 100):
        new, old, true = (step(m, length) for m in (model, eager, truth))
        assert new.keys() == old.keys() == true.keys()
        for name, value in true.items():
            errors = [(given[name].double() - value).norm() / value.norm() for given in (new, old)]
            assert errors[0] <= 2 * errors[1] + 2 * FLOOR[dtypes[0]], (name, length, errors)
    report = rewriter.report(model)
    assert report.coverage()["linear_4bit" if exclude else "lora"] == (14, 14)
    assert not report.near_misses and not report.fallbacks


def test_checkpointed_model():
    eager = qlora(True, torch.bfloat16, torch.float32)
    eager.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    eager.enable_input_require_grads()
    model, truth = copy.deepcopy(eager), exact(eager)
    rewriter.optimize(model)
    new, old, true = (step(m, 64) for m in (model, eager, truth))
    for name, value in true.items():
        errors = [(given[name].double() - value).norm() / value.norm() for given in (new, old)]
        assert errors[0] <= 2 * errors[1] + 2 * FLOOR[torch.bfloat16], (name, errors)
    assert rewriter.report(model).sites("lora")
