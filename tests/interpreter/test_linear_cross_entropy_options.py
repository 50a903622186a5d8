"""Every combination of options, as in tests/cpu, by the interpreted Triton kernels: those of rows, and Hopper's."""

import dataclasses

import pytest
import torch
from cpu.test_linear_cross_entropy_options import cases, check
from hypothesis import HealthCheck, given, settings

from rewriter.kernels import linear_cross_entropy_triton

FEW = settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@FEW
@given(cases())
def test_every_combination(case):
    check(case)


@pytest.fixture
def hopper(monkeypatch):
    """Hopper's kernels with small tiles; float32 stands for bfloat16, which the interpreter can't multiply."""
    used = []

    def suits(x, weight, dtype, label_smoothing, need_dbias):
        aligned = weight.shape[1] % 4 == 0 and (weight.stride(1), weight.stride(0) % 4) == (1, 0)
        used.append(aligned and weight.data_ptr() % 16 == 0 and not label_smoothing and not need_dbias)
        return used[-1]

    monkeypatch.setattr(linear_cross_entropy_triton, "suits", suits)
    monkeypatch.setattr(linear_cross_entropy_triton, "TILE", (16, 32, 16))
    yield used
    assert sum(used) > 12, "the kernels of Hopper hardly ran"


@FEW
@given(cases())
def test_exponentials(hopper, case):
    options = {**case.options, "label_smoothing": 0.0, "matmul_dtype": None, "out_dtype": None}
    fitting = {"width": case.width // 4 * 4 or 4, "weight_layout": "rows of more", "dtype": torch.float32}
    check(
        dataclasses.replace(
            case, **fitting, adapter=None, trained=(*case.trained[:2], False, False, False), options=options
        )
    )
