"""Activations that backward makes again, through Inductor: gradients in every bit as without, and less memory kept."""

import peft
import pytest
import torch
import transformers

import rewriter
from rewriter import made_again

HIDDEN, INTERMEDIATE, LAYERS, TOKENS = 512, 2048, 4, (4, 1024)


SIZES = dict(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=8, vocab_size=512, use_cache=False)


def gated():
    return transformers.LlamaConfig(intermediate_size=INTERMEDIATE, num_key_value_heads=2, **SIZES)


def centred():
    return transformers.GPTNeoXConfig(intermediate_size=INTERMEDIATE, use_parallel_residual=False, **SIZES)


def step(config, adapters, seed=0):
    """Gradients of one training step, and the bytes that forward leaves behind for backward."""
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if adapters:
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    model = rewriter.optimize(model.to("cuda", torch.bfloat16).train())
    batch = torch.randint(0, 512, TOKENS, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    for shorter in (64, 0, 0):  # compiled for one length, then for any, then measured
        ids = batch[:, shorter:].contiguous()
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = model(input_ids=ids, labels=ids).loss
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
    assert not rewriter.report(model).fallbacks
    return [p.grad for p in model.parameters() if p.grad is not None], kept


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(("config", "widths"), [(gated, INTERMEDIATE + 2 * HIDDEN), (centred, 2 * HIDDEN)])
def test_same_gradients_with_less_kept(config, widths, adapters, monkeypatch):
    """widths: of what a block's norms and gated unit give, which is not kept."""
    found, kept = step(config(), adapters)
    with monkeypatch.context() as patch:
        patch.setattr(made_again, "MADE_AGAIN", {})
        expected, more = step(config(), adapters)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert more - kept > 0.9 * LAYERS * TOKENS[0] * TOKENS[1] * widths * 2  # bytes
