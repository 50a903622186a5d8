"""The Triton kernels on CPU tensors, in Triton's interpreter, which must be chosen before Triton is imported."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreter needs its own process: TRITON_INTERPRET=1 pytest tests/interpreter")
