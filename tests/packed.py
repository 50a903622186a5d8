"""Weights in 4 bits for tests: packed by bitsandbytes, or made of random bytes."""

import bitsandbytes.functional
import torch

from rewriter.kernels.dequantize_4bit import Packed4bit


def quantized(matrix, quant_type="nf4", nested=False, blocksize=64):
    """(Packed4bit, what bitsandbytes unpacks it with) of a matrix."""
    options = {"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": nested}
    packed, state = bitsandbytes.functional.quantize_4bit(matrix, **options)
    return of_state(packed, state), (packed, state)


def of_state(packed, state):
    nested = state.state2
    second = (state.absmax, nested.code, state.offset) if nested is not None else (None, None, None)
    absmax, nested_blocksize = (nested.absmax, nested.blocksize) if nested is not None else (state.absmax, 0)
    kind = tuple(state.shape), state.blocksize, nested_blocksize, state.quant_type, state.dtype
    return Packed4bit(packed, absmax, *second, *kind)


def random_packed(shape, quant_type="nf4", nested=False, blocksize=64, dtype=torch.float32, device="cpu", seed=0):
    """Random bytes and scales: every code occurs, in blocks of any size."""
    generator = torch.Generator().manual_seed(seed)
    count = shape[0] * shape[1]
    blocks, nested_blocksize = -(-count // blocksize), 256 if nested else 0
    packed = torch.randint(0, 256, ((count + 1) // 2, 1), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-blocks // 256) if nested else blocks, generator=generator) + 0.1
    second = None, None, None
    if nested:
        codes = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        second = codes, torch.randn(256, generator=generator), torch.tensor(0.37)
    tensors = [None if t is None else t.to(device) for t in (packed, absmax, *second)]
    return Packed4bit(*tensors, tuple(shape), blocksize, nested_blocksize, quant_type, dtype)


def unpacked(weight, dtype=None):
    """The formula, number by number, in float32."""
    count = weight.shape[0] * weight.shape[1]
    code = bitsandbytes.functional.get_4bit_type(weight.quant_type, device=weight.packed.device)
    bytes_ = weight.packed.view(torch.uint8).flatten().long()
    numbers = code[torch.stack((bytes_ >> 4, bytes_ & 15), 1).flatten()[:count]]
    absmax, place = weight.absmax, torch.arange(count, device=code.device) // weight.blocksize
    if weight.codes is not None:
        block = torch.arange(len(weight.codes), device=code.device)
        absmax = weight.nested_code[weight.codes.long()] * absmax[block // weight.nested_blocksize] + weight.offset
    return (numbers * absmax[place]).view(weight.shape).to(dtype or weight.dtype)
