"""The memory-bound Triton kernels, interpreted: each must hold what row_cases.py asks of all."""

import pytest
from row_cases import CASES, DTYPES, PROPERTIES, offsets_that_pass_32_bits
from triton.runtime.interpreter import GridExecutor


# On a GPU all dtypes meet all properties; interpreted, that takes minutes, and each has the dtype it is hard for.
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds, dtype", zip(PROPERTIES, [DTYPES[0], DTYPES[1], *[DTYPES[2]] * 3], strict=True))
def test_property(holds, case, dtype):
    holds(case, dtype, "cpu")


@pytest.mark.parametrize("case", CASES)
def test_offsets_pass_32_bits(case, monkeypatch):
    # What a kernel wrote is in its arguments already, and all of their memory would be copied onto itself.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)
    offsets_that_pass_32_bits(case, "cpu")
