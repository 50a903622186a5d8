"""Results of forward that backward's kernels write once more: the same in every bit."""

import inspect

import pytest
import torch
from numerics import strided

from rewriter.kernels import glu, glu_triton, layer_norm, layer_norm_triton, rms_norm, rms_norm_triton
from rewriter.kernels.common import MADE_AGAIN


@pytest.fixture
def made(monkeypatch):
    """What backward's kernels wrote, asked for as a graph's pass asks for it."""
    written = []
    again = {entry.backward: entry for entry in MADE_AGAIN.values()}

    def launching(module):
        launch = module.launch

        def ask(kernel, *grid, **options):
            if kernel not in again:
                return launch(kernel, *grid, **options)
            names = list(inspect.signature(kernel.fn).parameters)

            def run(*arguments, **keywords):
                given = dict(zip(names, arguments, strict=False))
                y = torch.full((given["count"], given["width"]), float("nan"), dtype=given["DY"].dtype)
                written.append(y)
                at = names.index(again[kernel].result)
                assert arguments[at] is None
                return launch(kernel, *grid, **options)(*arguments[:at], y, *arguments[at + 1 :], **keywords)

            return run

        monkeypatch.setattr(module, "launch", ask)

    for module in (glu_triton, layer_norm_triton, rms_norm_triton):
        launching(module)
    return written


def check(made, y):
    y.sum().backward()
    (found,) = made
    assert torch.equal(found, y.detach().reshape(found.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options", [{"activation": "silu"}, {"activation": "gelu"}, {"activation": "silu", "limit": 0.5, "shift": 1.0}]
)
def test_gated_units(made, options, dtype):
    gate, up = (strided(3, 5, 72, dtype=dtype, seed=seed) for seed in (0, 1))
    check(made, glu.glu(gate, up, **options))


@pytest.mark.parametrize("gate_first", [True, False])
def test_packed_gated_units(made, gate_first):
    check(made, glu.glu_packed(strided(3, 5, 144), activation="silu", gate_first=gate_first))


def test_gated_unit_whose_gate_is_frozen(made):
    gate, up = strided(15, 72, grad=False), strided(15, 72, seed=1)
    check(made, glu.glu(gate, up, activation="silu"))


@pytest.mark.parametrize("options", [{}, {"offset": 1.0}, {"round_before_weight": True}, {"scale": 0.5, "floor": 0.7}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms(made, options, dtype):
    x, weight = strided(3, 5, 200, dtype=dtype), torch.rand(200, dtype=dtype, requires_grad=True)
    check(made, rms_norm.rms_norm(x, weight, 1e-6, **options))


def test_norm_of_a_sum_without_weight(made):
    x, r = (strided(3, 5, 200, seed=seed) for seed in (0, 1))
    y, s = rms_norm.add_rms_norm(x, r, None, 1e-6)
    (y.sum() + s.sum()).backward()
    (found,) = made
    assert torch.equal(found, y.detach().reshape(found.shape))


@pytest.mark.parametrize(
    "options", [{}, {"offset": 1.0}, {"round_before_weight": True}, {"scale": 0.5, "outside": 0.1}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layer_norms(made, options, dtype):
    x, weight, bias = strided(3, 5, 200, dtype=dtype), *(torch.rand(200, dtype=dtype) for _ in range(2))
    check(made, layer_norm.layer_norm(x, weight, bias, 1e-6, **options))


def test_layer_norm_of_a_sum_without_weight(made):
    x, r = (strided(3, 5, 200, seed=seed) for seed in (0, 1))
    y, s = layer_norm.add_layer_norm(x, r, None, None, 1e-6)
    (y.sum() + s.sum()).backward()
    (found,) = made
    assert torch.equal(found, y.detach().reshape(found.shape))
