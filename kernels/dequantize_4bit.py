"""Matrices in 4 bits, as bitsandbytes keeps them, unpacked (Dettmers et al., "QLoRA", 2023).

    w[i] = code[q[i]] * absmax[i // blocksize]         q: two to a byte, the first in the higher half

where the absmax may be kept in 8 bits itself ("double quantisation"):

    absmax[j] = nested_code[codes[j]] * nested_absmax[j // nested_blocksize] + offset

Every product and the sum are rounded to float32, and w once more to its dtype: what bitsandbytes computes, bit for bit.
One kernel does both levels, so that no absmax in float32 is ever in memory.
"""

import functools
import math
from typing import NamedTuple

import torch

from .common import ceil_div, jit, on_device, register, tl, traceable, use_triton

CODES = {
    # Quantiles of the normal distribution: appendix E of the paper.
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # A sign, two bits of exponent, one of mantissa; the largest is 12.
    "fp4": tuple(sign * size / 12 for sign in (1, -1) for size in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}  # fmt: skip

BYTES, WARPS = 1024, 8  # of a program: the 4 bytes of a thread make 8 numbers, 16 bytes to store if they have 16 bits


class Packed4bit(NamedTuple):
    """A frozen matrix [N, K] in 4 bits, with what an operator asks of a matrix.

    packed: (N * K + 1) // 2 bytes in order, dense, as a tensor of any shape and dtype.
    absmax: float32, one for each `blocksize` numbers; with `codes`, one for each `nested_blocksize` of those.
    codes: uint8, one for each `blocksize` numbers, with nested_code, float32 [256], and offset, float32 []; or None.
    shape: (N, K). quant_type: a key of CODES. dtype: what the matrix is in: bfloat16, float16 or float32.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    codes: torch.Tensor | None
    nested_code: torch.Tensor | None
    offset: torch.Tensor | None
    shape: tuple[int, int]
    blocksize: int
    nested_blocksize: int
    quant_type: str
    dtype: torch.dtype

    requires_grad, static = False, (True, True)

    def tensors(self):
        """The first five fields: what changes in a graph, or is kept for backward."""
        return self[:5]

    def of(self, tensors):
        """The same matrix made of other tensors."""
        return Packed4bit(*tensors, *self[5:])


@traceable
def dequantize_4bit(weight, dtype=None, after=None):
    """The matrix [N, K] of a Packed4bit, contiguous, in `dtype` (default weight.dtype).

    after: a tensor that is not read. A compiler would unpack a matrix for backward in forward, where all that it is
    made of is known, and keep it until then; it can't do so before it has this.
    Raises ValueError for tensors whose sizes or dtypes don't go with shape and blocksizes.
    """
    _check(weight)
    packed, absmax, codes, nested_code, offset = weight.tensors()
    numbers = weight.nested_blocksize, list(weight.shape), weight.blocksize, weight.quant_type, dtype or weight.dtype
    return _dequantize_op(packed, absmax, codes, nested_code, offset, *numbers, after)


def matrix(weight, dtype, after=None):
    """A weight in `dtype`: a matrix, or a Packed4bit, which is unpacked (see `dequantize_4bit`)."""
    return dequantize_4bit(weight, dtype, after) if isinstance(weight, Packed4bit) else weight.to(dtype)


def to_save(weights):
    """(tensors, rest) of matrices and Packed4bits, for an autograd.Function; `saved` puts them together again."""
    packed = [isinstance(w, Packed4bit) for w in weights]
    tensors = [t for w, is_packed in zip(weights, packed, strict=True) for t in (w.tensors() if is_packed else (w,))]
    return tensors, [w.of([None] * 5) if is_packed else None for w, is_packed in zip(weights, packed, strict=True)]


def saved(tensors, rest):
    tensors = iter(tensors)
    return [next(tensors) if w is None else w.of([next(tensors) for _ in range(5)]) for w in rest]


def _check(weight):
    packed, absmax, codes, nested_code, offset = weight.tensors()
    count = math.prod(weight.shape)
    if weight.quant_type not in CODES:
        raise ValueError(f"quant_type must be one of {', '.join(CODES)}, not {weight.quant_type!r}")
    if weight.blocksize < 2 or weight.blocksize & (weight.blocksize - 1):
        raise ValueError(f"blocksize must be a power of 2, not {weight.blocksize}")
    if packed.numel() * packed.element_size() != (count + 1) // 2:
        raise ValueError(f"{packed.numel() * packed.element_size()} bytes are no matrix {list(weight.shape)} in 4 bits")
    blocks = ceil_div(count, weight.blocksize)
    if codes is not None:
        if nested_code is None or offset is None or nested_code.numel() != 256 or offset.numel() != 1:
            raise ValueError("codes of absmax need a nested_code of 256 numbers and an offset")
        if codes.dtype is not torch.uint8 or codes.numel() != blocks:
            raise ValueError(f"codes must be {blocks} of uint8, not {codes.numel()} of {codes.dtype}")
        blocks = ceil_div(blocks, weight.nested_blocksize)
    floats = [t for t in (absmax, nested_code, offset) if t is not None]
    if absmax.numel() != blocks or any(t.dtype is not torch.float32 for t in floats):
        raise ValueError(f"absmax must be {blocks} of float32, not {absmax.numel()} of {absmax.dtype}")


@functools.cache
def _table(quant_type, device):
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


def _dequantize(
    packed, absmax, codes, nested_code, offset, nested_blocksize, shape, blocksize, quant_type, dtype, after
):
    packed = packed.contiguous().view(torch.uint8).flatten()
    absmax, codes, nested_code = (t if t is None else t.contiguous() for t in (absmax, codes, nested_code))
    table = _table(quant_type, packed.device)
    if use_triton(packed):
        out = torch.empty(shape, dtype=dtype, device=packed.device)
        _launch(out, packed, absmax, codes, nested_code, offset, table, blocksize, nested_blocksize)
        return out
    if codes is not None:
        absmax = _scaled(nested_code[codes.int()], absmax, nested_blocksize) + offset
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)
    numbers = pairs.index_select(0, packed.int()).flatten()[: math.prod(shape)]
    return _scaled(numbers, absmax, blocksize).to(dtype).view(shape)


def _scaled(numbers, absmax, blocksize):
    whole = len(numbers) // blocksize * blocksize
    numbers[:whole].view(-1, blocksize).mul_(absmax[: whole // blocksize, None])
    numbers[whole:] *= absmax[-1:]
    return numbers


def _dequantize_fake(
    packed, absmax, codes, nested_code, offset, nested_blocksize, shape, blocksize, quant_type, dtype, after
):
    return packed.new_empty(shape, dtype=dtype)


def _launch(out, packed, absmax, codes, nested_code, offset, table, blocksize, nested_blocksize):
    count = out.numel()
    columns = min(blocksize // 2, BYTES)
    rows = BYTES // columns
    with on_device(packed):
        _dequantize_kernel[(ceil_div(ceil_div(count, 2 * columns), rows),)](
            out, packed, absmax, codes, nested_code, offset, table, count,
            PIECES=blocksize // 2 // columns, NESTED=codes is not None, NESTED_BLOCK=nested_blocksize,
            WHOLE=count % (2 * columns) == 0, ROWS=rows, COLUMNS=columns, num_warps=WARPS,
            enable_fp_fusion=False,  # a fused product and sum would not be rounded in between
        )  # fmt: skip


@jit
def _dequantize_kernel(
    OUT, PACKED, ABSMAX, CODES, NESTED_CODE, OFFSET, TABLE, count,
    PIECES: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of COLUMNS bytes; a row is a block, or one of its PIECES. WHOLE: no row ends in the middle."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = row.to(tl.int64) * (2 * COLUMNS)
    inside = start < count
    block = row // PIECES
    if NESTED:
        code = tl.load(CODES + block, mask=inside, other=0).to(tl.int32)
        absmax = tl.load(NESTED_CODE + code) * tl.load(ABSMAX + block // NESTED_BLOCK, mask=inside, other=0.0)
        absmax += tl.load(OFFSET)
    else:
        absmax = tl.load(ABSMAX + block, mask=inside, other=0.0)
    byte = tl.arange(0, COLUMNS)[None, :]
    number = start[:, None] + tl.arange(0, 2 * COLUMNS)[None, :]
    if WHOLE:  # the same for a whole row, so that several bytes are loaded and several numbers stored at once
        has_byte, has_number = inside[:, None], inside[:, None]
    else:
        has_byte, has_number = start[:, None] + 2 * byte < count, number < count
    pair = tl.load(PACKED + (start // 2)[:, None] + byte, mask=has_byte, other=0).to(tl.int32)
    high = tl.load(TABLE + (pair >> 4)) * absmax[:, None]
    low = tl.load(TABLE + (pair & 15)) * absmax[:, None]
    tl.store(OUT + number, tl.interleave(high, low).to(OUT.dtype.element_ty), mask=has_number)


_dequantize_op = register(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? codes, Tensor? nested_code, Tensor? offset, "
    "int nested_blocksize, SymInt[] shape, int blocksize, str quant_type, ScalarType dtype, Tensor? after) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
