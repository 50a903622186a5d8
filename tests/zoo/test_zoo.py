"""Every causal language model of transformers trains with `rewriter.optimize` as it does without.

`-m "not rest"` runs one of each kind: about 24 types that have little in common.
"""

import pytest
import torch
from training import planted
from training.common import train
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo.alike import assert_alike
from zoo.models import TYPES, UNBUILDABLE, UNSTEADY, batch, build

import rewriter

SHAPES = [(2, 12), (2, 16), (2, 9)]

QUICK = {
    "llama": "the usual block",
    "qwen3": "norms of queries and keys, which share the width of a head",
    "gemma2": "1 + weight, soft caps, sliding windows, GELU",
    "gemma3n_text": "several residual streams, per-layer embeddings, shared keys, sparse activations",
    "gemma4": "inside a wrapper with images and sound",
    "cohere2": "attention and MLP side by side, layer norm without bias, interleaved rotation",
    "glm4": "fused gate and up, partial interleaved rotation, four norms a block",
    "phi": "partial rotation, biases, no GLU",
    "gpt2": "learned positions, Conv1D, dropout",
    "gptj": "rotation of pairs from a precomputed table",
    "gpt_neox": "fused queries, keys and values",
    "bloom": "ALiBi, layer norm after the embeddings",
    "opt": "positions with an offset, ReLU",
    "xlnet": "relative attention by einsum",
    "bert": "an encoder as decoder, post-norm, another norm before the head",
    "bart": "cross-attention",
    "deepseek_v3": "latent attention, grouped sigmoid routing, dense and sparse layers",
    "llama4_text": "complex rotation, chunked attention, layers without rotation",
    "gpt_oss": "attention sinks, clamped interleaved GLU, biases in experts",
    "mixtral": "experts chosen by softmax",
    "qwen3_next": "gated delta rule beside gated attention",
    "falcon_h1": "state space and attention in one block",
    "recurrent_gemma": "gated linear recurrence",
    "rwkv": "no attention, exponential decay in a loop",
}  # fmt: skip

EVERY = [pytest.param(t, marks=() if t in QUICK else pytest.mark.rest) for t in TYPES if t not in UNSTEADY]


def steps(model):
    return [batch(model, shape, seed) for seed, shape in enumerate(SHAPES)]


def check(model_type, **options):
    model = build(model_type)
    return assert_alike(model, steps(model), learning_rate=0.01, options=options)


@pytest.mark.parametrize("model_type", EVERY)
def test_trains_as_without(model_type):
    report = check(model_type)
    assert report.rewrites, f"nothing was found; {report}"


@pytest.mark.rest
@pytest.mark.parametrize("model_type", UNSTEADY)
def test_unsteady_ones_train(model_type):
    model = build(model_type)
    history = train(rewriter.optimize(model), steps(model), learning_rate=0.01)
    for loss, gradients in history:
        assert torch.isfinite(loss)
        assert all(g is None or torch.isfinite(g).all() for g in gradients.values())


FAULTS = {
    "raises": planted.unchanged(replacement=planted.boom),
    "raises when called": planted.replaced(planted.boom),
    "wrong numbers": planted.replaced(planted.wrong),
    "wrong backward": planted.backward(lambda x, w: (x, 1.01 * w)),
}


@pytest.mark.parametrize("model_type", QUICK)
def test_trains_on_with_a_broken_pattern(model_type):
    """Each type meets one of the faults in turn, in the place of the built-in RMS norm."""
    name = list(FAULTS)[list(QUICK).index(model_type) % len(FAULTS)]
    report = check(model_type, patterns=[FAULTS[name]])
    assert not report.sites("rms_norm"), f"{name}: still applied"


@pytest.mark.parametrize("model_type", sorted(UNBUILDABLE))
def test_what_is_left_out_still_fails(model_type):
    """Whoever makes one of them work takes it off the list."""
    with pytest.raises((ImportError, ValueError, TypeError, RuntimeError, KeyError, AttributeError)):
        model = build(model_type)
        model(**batch(model, SHAPES[0])).loss.backward()


def test_the_lists_cover_the_whole_library():
    assert sorted([*TYPES, *UNBUILDABLE]) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(TYPES) >= 186
    assert set(QUICK) | set(UNSTEADY) <= set(TYPES) and len(QUICK) == 24
