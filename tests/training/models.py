"""Tiny Hugging Face models, batches of different lengths, and adapters."""

import torch
import transformers
from peft import LoraConfig, get_peft_model

VOCABULARY, LAYERS = 128, 2
SHAPES = [(2, 16), (3, 24), (2, 20)]  # (batch, tokens) of three training steps

SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
NAMES = ["Llama", "Qwen2", "Qwen3", "Gemma2", "Phi3", "Glm4", "Mistral", "Olmo2"]


def build(name, seed=0, layers=LAYERS, **changes):
    """A tiny causal language model in training mode; every norm weight and bias is random, so that each one matters."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "num_hidden_layers": layers, **changes})
    if name == "Gemma2":
        config.query_pre_attn_scalar, config.sliding_window = 16, 12
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def with_lora(model, dropout=0.0, seed=1, **options):
    """PEFT adapters on all linears, both factors non-zero so that every gradient is alive from the first step."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return model.train()


def batch(shape, seed=0):
    """Token ids, a mask without padding, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, shape, generator=generator)
    labels = ids.masked_fill(torch.rand(shape, generator=generator) < 0.2, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def batches():
    return [batch(shape, seed) for seed, shape in enumerate(SHAPES)]


def norms_that_ran(model):
    """Paths of the RMSNorm modules that ran in one forward: one 1-d weight and the output of an RMS norm."""
    ran = []

    def note(module, args, output):
        x = args[0]
        for weight in (module.weight, 1 + module.weight):  # an RMS norm keeps the direction of every row
            if torch.nn.functional.cosine_similarity(output / weight, x, dim=-1).min() > 0.9999:
                ran.append(names[module])
                return

    names = {module: name for name, module in model.named_modules()}
    candidates = [m for m in names if list(dict(m.named_parameters())) == ["weight"] and m.weight.ndim == 1]
    handles = [m.register_forward_hook(note) for m in candidates]
    try:
        with torch.no_grad():
            model(**batch(SHAPES[0]))
    finally:
        for handle in handles:
            handle.remove()
    return sorted(ran)
