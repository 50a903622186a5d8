"""The memory-bound kernels' references: each must hold what row_cases.py asks of all."""

import pytest
import torch
from numerics import strided
from row_cases import CASES, DTYPES, PROPERTIES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_property(holds, case, dtype):
    holds(case, dtype, "cpu")


# Bytes that are kept for backward beside the inputs themselves, by rows and by elements of the first input in bfloat16
KEPT = {
    "rms_norm": lambda rows, elements: 4 * rows,
    "rms_norm, no weight": lambda rows, elements: 4 * rows,
    "rms_norm of heads": lambda rows, elements: 4 * rows,
    "add_rms_norm": lambda rows, elements: 4 * rows + 2 * elements,
    "layer_norm": lambda rows, elements: 8 * rows,
    "layer_norm, no vectors": lambda rows, elements: 8 * rows,
    "add_layer_norm": lambda rows, elements: 8 * rows + 2 * elements,
    "cross_entropy": lambda rows, elements: 8 * rows + 8 + 1,  # and the divisor, and whether any label counts
    "cross_entropy, all options": lambda rows, elements: 8 * rows + 8 + 1,
    "cross_entropy of rows": lambda rows, elements: 8 * rows,
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_kept_for_backward(case):
    new, _, build = CASES[case]
    inputs = build(
        lambda shape, seed: strided(*shape, dtype=torch.bfloat16, seed=seed),
        lambda n, seed: strided(n, dtype=torch.bfloat16, seed=seed),
    )
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage()) and t, lambda t: t
    ):
        new(*inputs)
    given = {t.untyped_storage().data_ptr() for t in inputs}
    x = inputs[0]
    beside = sum(storage.nbytes() for address, storage in kept.items() if address not in given)
    assert beside == KEPT.get(case, lambda rows, elements: 0)(x[..., 0].numel(), x.numel())
    if case.startswith("rotary"):
        assert not kept.keys() & {t.untyped_storage().data_ptr() for t in inputs[:2]}, "q and k are not needed"
