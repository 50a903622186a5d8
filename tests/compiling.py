"""Kernels compiled without a GPU, as a GPU run would: launches recorded instead of done, and what the binaries use.

The families' Triton paths run on CPU tensors with the launcher replaced, so that grid, constants and warps are the real
ones. Registers and spills are read from the bundled ptxas, or from the metadata of AMD's assembly.
"""

import re
import subprocess
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, "gfx942": 64}  # KiB that a program can have


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: tuple
    keywords: dict
    grid: tuple


def record_launches(set_attribute, families):
    """A list that fills with launches instead of their being done; set_attribute: as setattr, or monkeypatch's."""
    recorded = []

    def run(kernel, *arguments, grid, warmup, **keywords):
        assert len(grid) <= 3 and all(0 < n < 2**31 for n in grid) and all(n < 2**16 for n in grid[1:])
        recorded.append(Launch(kernel, arguments, keywords, grid))

    set_attribute(JITFunction, "run", run)
    for family in families:
        set_attribute(family, "use_triton", lambda x: True)
    return recorded


def type_of(value):
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>".replace(" ", "")
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "i64" if abs(value) >= 2**31 else "i32"


def source(kernel, arguments, keywords):
    """What Triton's launcher would compile: integers of 1 and None are constants, multiples of 16 are known as such."""
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        signature[parameter.name] = type_of(value)
        if isinstance(value, TensorDescriptor):
            continue
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compiled(launch, target, folder):
    """(Triton's binary, what it uses) for 80, 89, 90 or "gfx942"; folder: for the assembler's files.

    Spilled: bytes stored and loaded on NVIDIA's GPUs, registers on AMD's; moves has the widths of global accesses.
    """
    kernel, arguments, keywords, _ = launch
    names = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg")
    options = {name: keywords[name] for name in names if name in keywords}
    gpu = GPUTarget("hip", target, 64) if isinstance(target, str) else GPUTarget("cuda", target, 32)
    binary = triton.compile(source(kernel, arguments, keywords), target=gpu, options=options)
    if isinstance(target, str):
        used = _read_amd(binary.asm["amdgcn"])
    else:
        used = _assemble(binary.asm["ptx"], target, folder)
    return binary, used | {"shared_bytes": binary.metadata.shared}


def _read_amd(text):
    def count(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    moves = re.findall(r"\b((?:global|buffer)_(?:load|store)_\w+)", text)
    return {
        "registers": count("vgpr_count"),
        "spilled": count("vgpr_spill_count") + count("sgpr_spill_count"),
        "moves": sorted(set(moves)),
    }


def _assemble(ptx, capability, folder):
    (folder / "kernel.ptx").write_text(ptx)
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    ptxas = get_ptxas(capability).path
    command = [ptxas, "-v", f"--gpu-name={target}", str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert found, log
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled": sum(int(stores) + int(loads) for stores, loads in found),
        "moves": sorted(set(re.findall(r"\b((?:ld|st)\.global[\w.]*|cp\.async\.c[ag])", ptx))),
    }
