"""Every Triton kernel compiles for sm_80, sm_89, sm_90 and gfx942 without a GPU, from the arguments of a GPU run."""

import os

import pytest
import torch
from packed import random_packed

pytest.importorskip("triton")

from compiling import SHARED_MEMORY, compiled, record_launches
from triton.runtime.jit import JITFunction

from rewriter.kernels import (
    attention,
    attention_triton,
    cross_entropy,
    cross_entropy_triton,
    dequantize_4bit,
    glu,
    glu_triton,
    layer_norm,
    layer_norm_triton,
    linear_cross_entropy,
    linear_cross_entropy_triton,
    lora_triton,
    norm_rows,
    rms_norm,
    rms_norm_triton,
    rotary,
    scaled,
)
from rewriter.kernels.common import MADE_AGAIN

FAMILIES = (attention, cross_entropy, dequantize_4bit, glu, layer_norm, linear_cross_entropy, rms_norm, rotary, scaled)


def rms_norm_launches(width, dtype):
    x, w = (torch.ones(*shape, width, dtype=dtype, requires_grad=True) for shape in ((64,), ()))
    rms_norm.rms_norm(x, w, 1e-6, round_before_weight=True).backward(torch.ones_like(x))


def add_rms_norm_launches(width, dtype, **options):
    x, r, w = (torch.ones(*shape, width, dtype=dtype, requires_grad=True) for shape in ((64,), (64,), ()))
    out = rms_norm.add_rms_norm(x, r, w, 1e-6, round_before_weight=True, **options)
    torch.autograd.backward(out, [torch.ones_like(t) for t in out])


def layer_norm_launches(width, dtype, **options):
    x, w, b = (torch.ones(*shape, width, dtype=dtype, requires_grad=True) for shape in ((64,), (), ()))
    layer_norm.layer_norm(x, w, b, 1e-6, **options).backward(torch.ones_like(x))


def add_layer_norm_launches(width, dtype, **options):
    x, r, w, b = (torch.ones(*shape, width, dtype=dtype, requires_grad=True) for shape in ((64,), (64,), (), ()))
    out = layer_norm.add_layer_norm(x, r, w, b, 1e-6, **options)
    torch.autograd.backward(out, [torch.ones_like(t) for t in out])


def rotary_launches(width, dtype, interleaved=False):
    q, k = (torch.ones(2, 16, heads, width, dtype=dtype).transpose(1, 2).requires_grad_() for heads in (8, 2))
    cos, sin = (torch.ones(1, 1, 16, width, dtype=dtype) for _ in range(2))
    out = rotary.rotary(q, k, cos, sin, interleaved=interleaved)
    torch.autograd.backward(out, [torch.ones_like(t) for t in out])


def glu_launches(width, dtype, activation="silu"):
    gate, up = (torch.ones(16, width, dtype=dtype, requires_grad=True) for _ in range(2))
    glu.glu(gate, up, activation=activation).backward(torch.ones_like(up))


def glu_clamped_launches(width, dtype, interleaved):
    x = torch.ones(16, 2 * width, dtype=dtype, requires_grad=True)
    y = glu.glu_packed(x, activation="silu", interleaved=interleaved, alpha=1.702, limit=7.0, shift=1.0)
    y.backward(torch.ones_like(y))


def cross_entropy_launches(classes, dtype, weighted=False, **options):
    logits, target = torch.ones(16, classes, dtype=dtype, requires_grad=True), torch.zeros(16, dtype=torch.int64)
    weight = torch.ones(classes) if weighted else None
    cross_entropy.cross_entropy(logits, target, weight=weight, **options).sum().backward()


def linear_cross_entropy_launches(classes, dtype, **options):
    x, w = (torch.ones(n, 8, dtype=dtype, requires_grad=True) for n in (16, classes))
    target = torch.zeros(16, dtype=torch.int64)
    linear_cross_entropy.linear_cross_entropy(x, w, target, **options).sum().backward()


def exponentials_launches(dtype, width=4096, **options):
    """The head and loss of Hopper, in several chunks; they multiply in bfloat16 alone."""
    x, w = (torch.ones(n, width, dtype=dtype, requires_grad=True) for n in (512, 4100))
    target = torch.zeros(512, dtype=torch.int64)
    options = {"reduction": "none", "bias": torch.ones(4100, dtype=dtype), "z_loss": 1e-4, **options}
    linear_cross_entropy.linear_cross_entropy(x, w, target, chunk_tokens=256, **options).sum().backward()


def attention_launches(width, dtype, bias=None, visible=False, sink=False, keep=False, keys=256, **options):
    q, k, v = (
        torch.ones(2, n, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()
        for n, heads in ((256, 4), (keys, 2), (keys, 2))
    )
    attention.attention(
        q, k, v, bias=None if bias is None else torch.ones(2, 1, 256, keys, dtype=bias, requires_grad=True),
        visible=torch.ones(2, 1, 256, keys, dtype=torch.bool) if visible else None,
        sink=torch.ones(4, requires_grad=True) if sink else None,
        keep=torch.ones(2, 4, 256, keys, dtype=torch.bool) if keep else None, **options,
    ).sum().backward()  # fmt: skip


def lora_launches(dtype, rank, bias=None):
    x, *weights = (torch.ones(n, 1536, dtype=dtype) for n in (512, 4096, 4096, 2048))
    up = [torch.ones(len(w), rank, dtype=dtype) for w in weights]
    grads = [torch.ones(512, len(w), dtype=dtype) for w in weights]
    u, down = torch.ones(512, 3 * rank, dtype=dtype), torch.ones(3 * rank, 1536, dtype=dtype)
    lora_triton.products(x, weights, [bias] * 3, u, up, rank)
    lora_triton.input_gradient(grads, weights, u, down)
    if rank <= lora_triton.MOST_RANK_OF_PASS:
        lora_triton.gradients(grads, up, u, rank)
        lora_triton.gradients([g[:, :256].contiguous() for g in grads], [b[:256] for b in up], u, rank)


def dequantize_4bit_launches(dtype, shape=(256, 1536), **options):
    dequantize_4bit.dequantize_4bit(random_packed(shape, **options), dtype)


HOPPER = {
    "lora 16": lambda dtype: lora_launches(dtype, 16),
    "lora 64, bias": lambda dtype: lora_launches(dtype, 64, torch.ones(4096, dtype=dtype)),
    "loss on Hopper": exponentials_launches,
    "loss on Hopper, autocast": lambda dtype: exponentials_launches(torch.float32, matmul_dtype=torch.bfloat16),
    "loss on Hopper, plain": lambda dtype: exponentials_launches(dtype, 1536, reduction="mean", bias=None, z_loss=0.0),
    "loss on Hopper, soft cap": lambda dtype: exponentials_launches(dtype, softcap=30.0, class_weight=torch.ones(4100)),
}
CASES = {
    "rms_norm of heads": lambda dtype: rms_norm_launches(128, dtype),
    "rms_norm 1536": lambda dtype: rms_norm_launches(1536, dtype),
    "rms_norm 4096": lambda dtype: rms_norm_launches(4096, dtype),
    "rms_norm 8192": lambda dtype: rms_norm_launches(8192, dtype),
    "rms_norm 32768": lambda dtype: rms_norm_launches(32768, dtype),
    "add_rms_norm 1536": lambda dtype: add_rms_norm_launches(1536, dtype),
    "add_rms_norm 8192, all options": lambda dtype: add_rms_norm_launches(8192, dtype, scale=0.5, floor=0.1),
    "add_rms_norm 32768, all options": lambda dtype: add_rms_norm_launches(32768, dtype, scale=0.5, floor=0.1),
    "add_rms_norm 8192, outside": lambda dtype: add_rms_norm_launches(8192, dtype, scale=0.5, outside=0.1),
    "add_rms_norm 32768, outside": lambda dtype: add_rms_norm_launches(32768, dtype, scale=0.5, outside=0.1),
    "layer_norm 768": lambda dtype: layer_norm_launches(768, dtype),
    "layer_norm 8192": lambda dtype: layer_norm_launches(8192, dtype, offset=1.0, round_before_weight=True),
    "add_layer_norm 128": lambda dtype: add_layer_norm_launches(128, dtype),
    "add_layer_norm 8192": lambda dtype: add_layer_norm_launches(8192, dtype),
    "add_layer_norm 32768": lambda dtype: add_layer_norm_launches(32768, dtype),
    "add_layer_norm 8192, all options": lambda dtype: add_layer_norm_launches(
        8192, dtype, offset=1.0, round_before_weight=True, scale=0.5, outside=0.1
    ),
    "add_layer_norm 32768, all options": lambda dtype: add_layer_norm_launches(
        32768, dtype, offset=1.0, round_before_weight=True, scale=0.5, outside=0.1
    ),
    "rotary 128": lambda dtype: rotary_launches(128, dtype),
    "rotary 64, interleaved": lambda dtype: rotary_launches(64, dtype, interleaved=True),
    **{f"glu {name}": lambda dtype, name=name: glu_launches(8960, dtype, name) for name in glu.ACTIVATIONS},
    "glu clamped": lambda dtype: glu_clamped_launches(2880, dtype, interleaved=False),
    "glu clamped, interleaved": lambda dtype: glu_clamped_launches(2880, dtype, interleaved=True),
    "attention 64": lambda dtype: attention_launches(64, dtype, sink=True, is_causal=True),
    "attention 64, visible keys": lambda dtype: attention_launches(64, dtype, visible=True, keys=251),
    "attention 48, keep": lambda dtype: attention_launches(48, dtype, keep=True, dropout=0.1),
    "attention 128": lambda dtype: attention_launches(128, dtype, sink=True, softcap=50.0, is_causal=True),
    "attention 128, visible keys": lambda dtype: attention_launches(128, dtype, visible=True),
    "attention 128, bias": lambda dtype: attention_launches(128, dtype, bias=torch.float32, softcap=50.0),
    "attention 64, floor": lambda dtype: attention_launches(64, dtype, bias=torch.float32, floor=-3e38, is_causal=True),
    "attention 128, fill": lambda dtype: attention_launches(
        256 // dtype.itemsize, dtype, bias=torch.float32, visible=True, fill=-3e38, is_causal=True
    ),
    "attention 128, fill before the bias": lambda dtype: attention_launches(
        256 // dtype.itemsize, dtype, bias=torch.float32, visible=True, fill=-3e38, fill_first=True
    ),
    "attention 256, visible keys": lambda dtype: attention_launches(512 // dtype.itemsize, dtype, visible=True),
    "loss of logits": lambda dtype: cross_entropy_launches(151936, dtype),
    "loss of logits, all options": lambda dtype: cross_entropy_launches(
        50257, dtype, weighted=True, softcap=30.0, label_smoothing=0.1, z_loss=1e-4
    ),
    "loss of each row of logits": lambda dtype: cross_entropy_launches(1000, dtype, reduction="none"),
    "loss": lambda dtype: linear_cross_entropy_launches(151936, dtype),
    "loss, all options": lambda dtype: linear_cross_entropy_launches(50257, dtype, softcap=30.0, label_smoothing=0.1),
    "loss of each row": lambda dtype: linear_cross_entropy_launches(50257, dtype, reduction="none"),
    "4 bits": dequantize_4bit_launches,
    "4 bits, nested": lambda dtype: dequantize_4bit_launches(dtype, nested=True),
    "4 bits, nested, long blocks": lambda dtype: dequantize_4bit_launches(dtype, nested=True, blocksize=4096),
    "4 bits, odd": lambda dtype: dequantize_4bit_launches(dtype, (255, 1537), nested=True),
}


# Kernels that use nothing of NVIDIA's alone, one of each kind
AMD = [
    "rms_norm of heads", "rms_norm 32768", "add_rms_norm 8192, all options", "add_layer_norm 8192, all options",
    "rotary 128", "rotary 64, interleaved", "glu mish", "glu clamped, interleaved", "loss of logits",
    "loss of logits, all options", "4 bits, nested",
]  # fmt: skip


@pytest.fixture
def launches(monkeypatch):
    return record_launches(monkeypatch.setattr, FAMILIES)


# Compiling an attention takes 10 s: for each target and dtype but the first, these alone.
# REWRITER_COMPILE=all compiles everything.
SOME_ATTENTION = ["attention 64", "attention 128, fill", "attention 256, visible keys"]


def targets():
    """(case, compute capability, dtype)."""
    yield from ((case, 90, torch.bfloat16) for case in CASES)
    whole = os.environ.get("REWRITER_COMPILE") == "all"
    for case in CASES:
        if whole or case in SOME_ATTENTION or not case.startswith("attention"):
            yield case, 90, torch.float32
            yield case, 80, torch.bfloat16
        if whole or case in SOME_ATTENTION or case in AMD:
            yield case, 89, torch.bfloat16  # the instructions of 80, and less shared memory


@pytest.mark.parametrize("case, capability, dtype", targets())
def test_compiles_without_spills(case, capability, dtype, launches, monkeypatch, tmp_path):
    monkeypatch.setattr(attention_triton, "has_warpgroups", lambda x: capability == 90)
    check_compiled(CASES[case], dtype, capability, launches, tmp_path)


@pytest.mark.parametrize("case", AMD)
def test_compiles_for_amd_without_spills(case, launches, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    check_compiled(CASES[case], torch.bfloat16, "gfx942", launches, tmp_path)


def check_compiled(case, dtype, target, launches, folder):
    case(dtype)
    assert launches
    for launch in launches:
        _, used = compiled(launch, target, folder)
        assert used["shared_bytes"] <= SHARED_MEMORY[target] << 10, launch.kernel.__name__
        assert used["spilled"] == 0, launch.kernel.__name__


@pytest.mark.parametrize("case", ["rms_norm 1536", "rms_norm 8192", "layer_norm 768", "layer_norm 8192", "glu silu"])
def test_what_backward_makes_again_spills_nothing(case, launches, tmp_path):
    """The kernels as a graph's pass asks for them."""
    CASES[case](torch.bfloat16)
    again = {entry.backward: entry.result for entry in MADE_AGAIN.values()}
    (launch,) = (launch for launch in launches if launch.kernel in again)
    at = launch.kernel.arg_names.index(again[launch.kernel])
    arguments = (*launch.arguments[:at], torch.empty(16, dtype=torch.bfloat16), *launch.arguments[at + 1 :])
    _, used = compiled(launch._replace(arguments=arguments), 90, tmp_path)
    assert used["spilled"] == 0


@pytest.mark.parametrize("nested", [False, True])
def test_unpacking_rounds_every_step_and_moves_16_bytes(nested, launches, tmp_path):
    dequantize_4bit_launches(torch.bfloat16, nested=nested)
    (launch,) = launches
    ptx = compiled(launch, 90, tmp_path)[0].asm["ptx"]
    assert "fma" not in ptx
    assert "st.global.v4.b32" in ptx


@pytest.mark.parametrize(
    "launch_all",
    [
        lambda dtype: rotary_launches(128, dtype),
        lambda dtype: rotary_launches(80, dtype, interleaved=True),
        lambda dtype: glu_launches(8960, dtype),
        lambda dtype: glu_clamped_launches(2880, dtype, interleaved=True),
    ],
)
def test_everything_moves_by_16_bytes(launch_all, launches, tmp_path):
    launch_all(torch.bfloat16)
    for launch in launches:
        assert compiled(launch, 90, tmp_path)[1]["moves"] == ["ld.global.v4.b32", "st.global.v4.b32"]


@pytest.mark.parametrize("case", HOPPER)
def test_compiles_for_hopper(case, launches, monkeypatch, tmp_path):
    monkeypatch.setattr(linear_cross_entropy_triton, "has_tensor_memory_accelerator", lambda x: True)
    check_compiled(HOPPER[case], torch.bfloat16, 90, launches, tmp_path)


def test_every_kernel_is_compiled(launches, monkeypatch):
    for case in CASES.values():
        case(torch.bfloat16)
    monkeypatch.setattr(linear_cross_entropy_triton, "has_tensor_memory_accelerator", lambda x: True)
    for case in HOPPER.values():
        case(torch.bfloat16)
    families = (attention_triton, cross_entropy_triton, dequantize_4bit, glu_triton, layer_norm_triton,
                linear_cross_entropy_triton, lora_triton, norm_rows, rms_norm_triton, rotary, scaled)  # fmt: skip
    kernels = {f.__name__ for m in families for f in vars(m).values() if isinstance(f, JITFunction)}
    assert {k for k in kernels if k.endswith("_kernel")} == {launch.kernel.__name__ for launch in launches}
