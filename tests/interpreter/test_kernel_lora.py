"""The Triton kernel of low-rank adapters, interpreted; float32 stands for bfloat16, which can't be multiplied there."""

import pytest
import torch
from numerics import strided

from rewriter.kernels import lora_triton


@pytest.mark.parametrize("outs", [(72,), (40, 8), (24, 72, 16)])
@pytest.mark.parametrize("rank", [3, 16])
def test_products(monkeypatch, outs, rank):
    monkeypatch.setattr(lora_triton, "TILE", (16, 32, 16))
    x, u = strided(77, 40, grad=False), strided(77, len(outs) * 16, grad=False, seed=1)
    weights = [strided(n, 40, grad=False, seed=2 + i) for i, n in enumerate(outs)]
    up = [strided(n, rank, grad=False, seed=9 + i) for i, n in enumerate(outs)]
    biases = [strided(n, grad=False, seed=20 + i) if i != 1 else None for i, n in enumerate(outs)]
    found = lora_triton.products(x, weights, biases, u, up)
    for i, (y, w, b, bias) in enumerate(zip(found, weights, up, biases, strict=True)):
        expected = torch.nn.functional.linear(x, w, bias) + u[:, 16 * i : 16 * i + rank] @ b.t()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
