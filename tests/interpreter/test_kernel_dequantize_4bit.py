"""Triton's kernel that unpacks 4 bits, interpreted."""

import pytest
import torch
from packed import random_packed, unpacked

from rewriter.kernels import dequantize_4bit as family


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 96), (1, 4097), (50, 64)])
@pytest.mark.parametrize("blocksize", [2, 32, 64, 4096])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", family.CODES)
def test_every_option_and_odd_sizes(quant_type, nested, blocksize, shape):
    weight = random_packed(shape, quant_type, nested, blocksize)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = family.dequantize_4bit(weight, dtype)
        expected = unpacked(weight, dtype)
        if dtype is torch.bfloat16:  # which the interpreter cuts off to, where a GPU rounds
            expected = (unpacked(weight).view(torch.int32) & -65536).view(torch.float32).bfloat16()
        assert found.dtype is dtype and torch.equal(found, expected)


def test_more_codes_than_a_nested_block():
    weight = random_packed((300, 64), nested=True)
    assert len(weight.absmax) == 2
    assert torch.equal(family.dequantize_4bit(weight), unpacked(weight))
