"""Models whose linear layers are in 4 or 8 bits, made by bitsandbytes, and the same models in float64."""

import copy

import bitsandbytes
import torch
from torch import nn


def in_4_bits(model, *, quant_type="nf4", nested=True, compute=torch.float32, blocksize=64, only=lambda name: True):
    """Linear layers of the blocks become bitsandbytes' in place; a weight's own dtype is what it is unpacked to."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and "lm_head" not in name and only(name):
            options = {"compute_dtype": compute, "quant_type": quant_type, "compress_statistics": nested}
            new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, **options)
            weight = {"quant_type": quant_type, "compress_statistics": nested, "blocksize": blocksize}
            new.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, **weight)
            new.bias = layer.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new.to(layer.weight.device))
    model.is_loaded_in_4bit = True  # what transformers notes, for PEFT to read
    return model


def in_8_bits(model):
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and "lm_head" not in name:
            bias = layer.bias is not None
            new = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, bias, has_fp16_weights=False)
            new.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            new.bias = layer.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new.to("cpu"))
    model.is_loaded_in_8bit = True
    return model


def exact(model):
    """A copy in float64 with matrices for the weights in 4 bits."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
            state = copy.copy(layer.weight.quant_state)
            state.dtype = torch.float32
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state).double()
            new.weight, new.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    return model.double()
