"""The Triton kernels of low-rank adapters, interpreted; float32 stands for bfloat16, which is not multiplied there."""

import pytest
import torch
from numerics import strided

from rewriter.kernels import lora, lora_triton

OUTS = [(72,), (40, 8), (24, 72, 16)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(lora_triton, "TILE", {"BM": 16, "BN": 32, "BK": 16})
    monkeypatch.setattr(lora_triton, "PASS", {"BM": 16, "BN": 64})


def matrices(*shapes, seed=0):
    return [strided(*shape, grad=False, seed=seed + i) for i, shape in enumerate(shapes)]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("outs", OUTS)
@pytest.mark.parametrize("rank", [3, 16])
def test_products(outs, rank):
    x, u = matrices((77, 40), (77, len(outs) * 16))
    weights, up = matrices(*((n, 40) for n in outs), seed=2), matrices(*((n, rank) for n in outs), seed=9)
    biases = [strided(n, grad=False, seed=20 + i) if i != 1 else None for i, n in enumerate(outs)]
    found = lora_triton.products(x, weights, biases, u, up, 16)
    for i, (y, w, b, bias) in enumerate(zip(found, weights, up, biases, strict=True)):
        close(y, torch.nn.functional.linear(x, w, bias) + u[:, 16 * i : 16 * i + rank] @ b.t())


@pytest.mark.parametrize("outs", OUTS)
@pytest.mark.parametrize("branch", [False, True])
def test_input_gradient(outs, branch):
    grads, weights = matrices(*((77, n) for n in outs)), matrices(*((n, 40) for n in outs), seed=5)
    v, down = matrices((77, 16 * len(outs)), (16 * len(outs), 40), seed=9) if branch else (None, None)
    expected = sum(g @ w for g, w in zip(grads, weights, strict=True))
    close(lora_triton.input_gradient(grads, weights, v, down), expected + v @ down if branch else expected)


@pytest.mark.parametrize("outs", OUTS)
@pytest.mark.parametrize("rank", [3, 16, 21])
@pytest.mark.parametrize("rows", [5, 77])
def test_gradients(outs, rank, rows):
    each = 16 if rank <= 16 else 32
    grads, up = matrices(*((rows, n) for n in outs)), matrices(*((n, rank) for n in outs), seed=5)
    (u,) = matrices((rows, each * len(outs)), seed=9)
    v, dup = lora_triton.gradients(grads, up, u, each)
    for i, (g, b, db) in enumerate(zip(grads, up, dup, strict=True)):
        close(v[:, i * each :][:, :rank], g @ b)
        assert not v[:, i * each + rank : (i + 1) * each].any()
        close(db, g.t() @ u[:, i * each : i * each + rank])


def test_biases_that_are_columns(monkeypatch):
    """Through the operator, whose kernels read vectors densely."""
    monkeypatch.setattr(lora_triton, "suits", lambda *matrices, each: True)
    x, u, weight, up, table = matrices((77, 40), (77, 16), (24, 40), (24, 16), (24, 3))
    (y,) = lora._products_implementation(x, [weight], [table[:, 1]], u, [up])
    close(y, torch.nn.functional.linear(x, weight, table[:, 1]) + u @ up.t())
