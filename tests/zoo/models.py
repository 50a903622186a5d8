"""A tiny random model for every causal language model that transformers knows, and batches to train it with."""

import inspect

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo.sizes import CODEBOOKS, EXTRA_INPUTS, MULTIPLES, OVERRIDES, PARTS, SIZES, UNBUILDABLE, UNSTEADY

VOCABULARY, MOST_LAYERS = 128, 4
TYPES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(UNBUILDABLE))
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
__all__ = ["TYPES", "UNBUILDABLE", "UNSTEADY", "batch", "build", "configuration"]


def configuration(model_type):
    """The smallest configuration in which each kind of layer still occurs."""
    cls = CONFIG_MAPPING[model_type]
    if model_type in PARTS:
        cls = cls.sub_configs[PARTS[model_type]]
    return cls(**_arguments(cls, OVERRIDES.get(model_type, {})))


def _arguments(cls, special):
    """SIZES for what this configuration class knows, its sub-configurations alike, then what `special` says."""
    default = _default(cls, special)
    known = default.to_dict()
    names = cls.attribute_map or {}
    arguments = {names.get(k, k): v for k, v in SIZES.items() if names.get(k, k) in known}
    kinds = {k: list(dict.fromkeys(known[k])) for k in LAYER_LISTS if isinstance(known.get(k), list)}
    count = max([2, *map(len, kinds.values())])
    if count > 2 and "num_hidden_layers" in names:
        arguments[names["num_hidden_layers"]] = count
    elif "num_hidden_layers" in arguments:
        arguments["num_hidden_layers"] = count
    arguments |= {k: [v[i % len(v)] for i in range(count)] for k, v in kinds.items() if v}
    for name in cls.sub_configs:
        inner = getattr(default, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            arguments[name] = {"model_type": inner.model_type} | _arguments(type(inner), special.get(name, {}))
    nested = {k: v for k, v in special.items() if not (k in cls.sub_configs and isinstance(v, dict))}
    return arguments | nested


def _default(cls, special):
    try:
        return cls()
    except StrictDataclassError:  # the library's own default is not valid
        return cls(**special)


def build(model_type, seed=0):
    """In training mode; every trained parameter is random, so that each norm weight and each bias matters."""
    torch.manual_seed(seed)
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(configuration(model_type))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.2 if parameter.ndim == 1 else 0.02) * noise)
    return model.train()


def batch(model, shape, seed=0):
    """Token ids, labels of which some are ignored, a mask without padding where the model takes one, and its extras."""
    kind = model.config.model_type
    rows, tokens = shape[0], shape[1] - shape[1] % MULTIPLES.get(kind, 1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 28, (rows, tokens), generator=generator)  # above are images and sound
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    inputs = {"input_ids": ids, "labels": labels}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = torch.ones_like(ids)
    if kind in CODEBOOKS:
        inputs["input_ids"] = ids.repeat_interleave(CODEBOOKS[kind], 0)
        inputs["labels"] = labels[..., None].expand(-1, -1, CODEBOOKS[kind])
    for name, rest in EXTRA_INPUTS.get(kind, {}).items():
        inputs[name] = torch.randn(rows, *rest, generator=generator)
    return inputs
