"""What AOTAutograd's graphs hold of the kernels that it takes in: launches that write nothing but new tensors.

The analysis that finds what a launch writes is PyTorch's; where it fails, all arguments are copied. Triton compiles for
Hopper here, on fake tensors of a CPU: no GPU is needed.
"""

import contextlib

import pytest
import torch

triton = pytest.importorskip("triton")

from torch._functorch.aot_autograd import aot_export_joint_simple  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from rewriter.kernels import (  # noqa: E402
    common,
    glu,
    glu_triton,
    layer_norm,
    layer_norm_triton,
    lora,
    lora_triton,
    rms_norm,
    rms_norm_triton,
    rotary,
)

TRACED = (common, glu, glu_triton, layer_norm, layer_norm_triton, lora, lora_triton, rms_norm, rms_norm_triton, rotary)

LAUNCH = torch.ops.higher_order.triton_kernel_wrapper_functional
CREATED = ("empty_like", "new_empty", "empty", "empty_strided")


class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(driver, "_active", Hopper())
    for module in TRACED:
        for name, value in {
            "use_triton": lambda x: True,
            "processors": lambda x: 132,
            "on_device": lambda x: contextlib.nullcontext(),
            "has_tensor_memory_accelerator": lambda x: True,
            "_all_bfloat16": lambda *tensors: True,
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def adapters(rank):
    def function(x, w_1, w_2, a_1, a_2, b_1, b_2):
        return lora.lora(x, [w_1.detach(), w_2.detach()], [None, None], [a_1, a_2], [b_1, b_2], [2.0, 0.5])

    return function, [(4, 64, 1536), *[(2048, 1536)] * 2, *[(rank, 1536)] * 2, *[(2048, rank)] * 2]


def heads(interleaved):
    def function(q, k, cos, sin):
        tables = cos.detach(), sin.detach()
        return rotary.rotary(q.transpose(1, 2), k.transpose(1, 2), *tables, interleaved=interleaved)

    return function, [(4, 64, 12, 128), (4, 64, 2, 128), (1, 1, 64, 128), (1, 1, 64, 128)]


# name: (function, shapes of its inputs), launches
CASES = {
    "rms_norm": ((lambda x, w: rms_norm.rms_norm(x, w, 1e-6), [(4, 64, 1536), (1536,)]), 3),
    "rms_norm, wide": ((lambda x, w: rms_norm.rms_norm(x, w, 1e-6), [(64, 20000), (20000,)]), 4),
    "add_rms_norm": (
        (lambda x, r, w: rms_norm.add_rms_norm(x, r, w, 1e-6), [(4, 64, 1536), (4, 64, 1536), (1536,)]),
        3,
    ),
    "layer_norm": ((lambda x, w, b: layer_norm.layer_norm(x, w, b, 1e-6), [(4, 64, 768), (768,), (768,)]), 3),
    "glu": ((lambda g, u: glu.glu(g, u, activation="silu"), [(4, 64, 640), (4, 64, 640)]), 2),
    "glu, packed": ((lambda x: glu.glu_packed(x, activation="gelu"), [(4, 64, 1280)]), 2),
    "glu, interleaved": ((lambda x: glu.glu_packed(x, activation="silu", interleaved=True), [(4, 64, 1280)]), 2),
    "rotary": (heads(False), 2),
    "rotary, interleaved": (heads(True), 2),
    "lora 16": (adapters(16), 3),
    "lora 64": (adapters(64), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_launches_write_new_tensors_alone(name, hopper, caplog):
    (function, shapes), launches = CASES[name]
    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]

        def outputs(*tensors):
            found = function(*tensors)
            return tuple(found) if isinstance(found, tuple | list) else (found,)

        graph = aot_export_joint_simple(outputs, inputs, trace_joint=True).graph
    found = [node for node in graph.nodes if node.target is LAUNCH]
    assert len(found) == launches
    for node in found:
        for written in node.kwargs["tensors_to_clone"]:
            assert _origin(node.kwargs["kwargs"][written]).target.__name__.split(".")[0] in CREATED, written
    assert not any("rewriter" in str(node.target) for node in graph.nodes), "an operator was left opaque"
    assert "every input is mutated" not in caplog.text


def _origin(node):
    """What a view is a view of."""
    while node.target in (torch.ops.aten.permute.default, torch.ops.aten.view.default, torch.ops.aten.t.default):
        node = node.args[0]
    return node
