"""Unpacking of matrices in 4 bits, bit for bit as bitsandbytes does it."""

import bitsandbytes.functional
import pytest
import torch
from packed import quantized, random_packed, unpacked

from rewriter.kernels.dequantize_4bit import CODES, dequantize_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("quant_type", CODES)
def test_codes_are_bitsandbytes(quant_type):
    theirs = bitsandbytes.functional.get_4bit_type(quant_type, device="cpu")
    assert torch.equal(torch.tensor(CODES[quant_type]), theirs)


# Rows of whole blocks, or of odd length: bitsandbytes' code for AVX512 begins a block with every row.
@pytest.mark.parametrize(
    "shape, blocksize", [((64, 128), 64), ((48, 64), 32), ((3, 8192), 4096), ((7, 5), 64), ((33, 77), 32)]
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_bitsandbytes(dtype, quant_type, nested, shape, blocksize):
    weight, theirs = quantized(torch.randn(shape).to(dtype), quant_type, nested, blocksize)
    expected = bitsandbytes.functional.dequantize_4bit(*theirs)
    found = dequantize_4bit(weight)
    assert found.dtype is dtype and found.is_contiguous() and torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 96), (129, 64), (1, 40000)])
@pytest.mark.parametrize("blocksize", [2, 64, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_formula(nested, blocksize, shape):
    for dtype in DTYPES:
        weight = random_packed(shape, "fp4", nested, blocksize)
        assert torch.equal(dequantize_4bit(weight, dtype), unpacked(weight, dtype))


@pytest.mark.parametrize("storage", DTYPES)
def test_bytes_kept_as_other_types(storage):
    weight = random_packed((32, 64))
    other = weight._replace(packed=weight.packed.flatten().view(storage).unsqueeze(1))
    assert torch.equal(dequantize_4bit(other), dequantize_4bit(weight))
    assert torch.equal(dequantize_4bit(weight._replace(packed=weight.packed.t())), dequantize_4bit(weight))


def test_fakes():
    weight = random_packed((32, 64), nested=True)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = weight.of(mode.from_tensor(t) for t in weight.tensors())
        found = dequantize_4bit(fake, torch.bfloat16)
    assert (found.shape, found.dtype) == ((32, 64), torch.bfloat16)


def test_wrong_arguments_are_named():
    plain, nested = random_packed((32, 64)), random_packed((32, 64), nested=True)
    for weight, words in [
        (plain._replace(quant_type="int4"), "int4"),
        (plain._replace(blocksize=48), "power of 2, not 48"),
        (plain._replace(shape=(32, 65)), r"1024 bytes are no matrix \[32, 65\]"),
        (plain._replace(absmax=plain.absmax[1:]), "absmax must be 32 of float32, not 31"),
        (plain._replace(absmax=plain.absmax.half()), "float16"),
        (nested._replace(offset=None), "need a nested_code"),
        (nested._replace(codes=nested.codes.int()), "of torch.int32"),
        (nested._replace(absmax=nested.absmax.repeat(2)), "absmax must be 1 of float32, not 2"),
    ]:
        with pytest.raises(ValueError, match=words):
            dequantize_4bit(weight)
