"""The training works that are measured: a model's shape, what is trained, and the batch. Weights are random.

A work's name is `<model>-<method>`: qwen2-1.5b-lora, llama-1b-full ... Methods: `lora` (PEFT, rank 16 on all linear
layers of the blocks, adapters in the weights' dtype), `qlora` (the same on a base of 4 bits: the random weights as NF4
by bitsandbytes, scales quantised once more), `full` (every weight trains).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

METHODS = ("lora", "qlora", "full")
RANK, ALPHA = 16, 32


@dataclass(frozen=True)
class Shape:
    """A causal language model: configuration class of transformers, its arguments, weights' dtype, batch and length."""

    config: str
    sizes: dict
    dtype: torch.dtype = torch.bfloat16
    batch: int = 4
    length: int = 2048


def _sizes(hidden, layers, heads, kv_heads, intermediate, vocab, theta, tied=True, eps=1e-6):
    return dict(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocab, tie_word_embeddings=tied, rms_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": theta}, max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip


SHAPES = {
    "qwen2-1.5b": Shape("Qwen2Config", _sizes(1536, 28, 12, 2, 8960, 151936, 1e6)),
    "llama-1b": Shape("LlamaConfig", _sizes(2048, 16, 32, 8, 8192, 128256, 5e5, eps=1e-5)),
    "llama-8b": Shape("LlamaConfig", _sizes(4096, 32, 32, 8, 14336, 128256, 5e5, tied=False, eps=1e-5), batch=2),
    # For a smoke run on a CPU; its times mean nothing.
    "tiny": Shape("LlamaConfig", _sizes(64, 2, 4, 2, 128, 512, 1e4), torch.float32, batch=2, length=32),
}


def parse(name: str) -> tuple[Shape, str]:
    """The shape and the method of a work; ValueError for an unknown one."""
    shape, _, method = name.rpartition("-")
    if shape not in SHAPES or method not in METHODS:
        raise ValueError(f"unknown work {name!r}; a work is one of {', '.join(SHAPES)}, then -{' or -'.join(METHODS)}")
    return SHAPES[shape], method


def configuration(shape: Shape):
    import transformers

    return getattr(transformers, shape.config)(**shape.sizes)


def base(name: str, device: str, seed: int) -> nn.Module:
    """The model without what the method adds, initialised on the device: the same seed gives the same weights."""
    from transformers import AutoModelForCausalLM

    shape, _ = parse(name)
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(configuration(shape), dtype=shape.dtype, attn_implementation="sdpa")


def build(name: str, device: str, seed: int, checkpointing: bool) -> nn.Module:
    """The model, initialised on the device and ready to train."""
    _, method = parse(name)
    model = base(name, device, seed)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if method == "qlora":
        _quantise(model, device)
    if method != "full":
        model = _with_lora(model, seed)
    return model.to(device).train()


def _quantise(model: nn.Module, device: str) -> None:
    """Every linear layer of the blocks in NF4, computing in the dtype that its weight had; the head stays as it is."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for block in blocks(model):
        for parent in list(block.modules()):
            for key, layer in list(parent.named_children()):
                if type(layer) is not nn.Linear:
                    continue
                weight, sizes = layer.weight.data, (layer.in_features, layer.out_features)
                new = Linear4bit(*sizes, bias=layer.bias is not None, compute_dtype=weight.dtype, device="meta")
                new.bias = layer.bias
                new.weight = Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
                )
                setattr(parent, key, new.to(device))  # packs the weight
    model.is_loaded_in_4bit = True  # what PEFT asks for before it looks at the layers


def _with_lora(model: nn.Module, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    options = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    model = get_peft_model(model, options, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:  # float32 beside weights in 4 bits
            parameter.data = parameter.data.to(dtype)
    return model


def batch(name: str, device: str, seed: int) -> dict[str, torch.Tensor]:
    """Random token ids, which are their own labels. Every step gets the same ones, so that the loss falls."""
    shape, _ = parse(name)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, shape.sizes["vocab_size"], (shape.batch, shape.length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks: the longest list of modules."""
    return list(max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len))
