"""The memory-bound Triton kernels on a GPU: each must hold what row_cases.py asks of all."""

import pytest
from row_cases import CASES, DTYPES, PROPERTIES, offsets_that_pass_32_bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_property(holds, case, dtype):
    holds(case, dtype, "cuda")


@pytest.mark.parametrize("case", CASES)
def test_offsets_pass_32_bits(case):
    offsets_that_pass_32_bits(case, "cuda")
