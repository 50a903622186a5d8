"""Every causal language model of transformers trains with `rewriter.optimize` as without, and its places are found.

`-m "not rest"` runs one of each kind: about 24 types that have little in common.
"""

import copy
from collections import Counter

import pytest
import torch
from training.common import train
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo.alike import assert_alike
from zoo.census import census, compare
from zoo.faults import FAULTS, broken
from zoo.models import TYPES, UNBUILDABLE, UNSTEADY, batch, build
from zoo.sizes import MISSED

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


@pytest.mark.parametrize("model_type", EVERY)
def test_trains_as_without(model_type):
    """The quick ones with batches of several lengths, the rest with one."""
    model = build(model_type)
    batches = steps(model)[: None if model_type in QUICK else 1]
    ran = census(copy.deepcopy(model), batches[0])
    report = assert_alike(model, batches, learning_rate=0.01)
    missed = Counter()
    for row in compare(ran, report):
        missed[row.pattern] += max(0, row.ran - row.found)
    assert dict(+missed) == MISSED.get(model_type, ({}, ""))[0], report


@pytest.mark.parametrize("model_type, fault", zip(list(QUICK)[::2], FAULTS * 2, strict=True))
def test_trains_on_where_every_pattern_is_broken(model_type, fault):
    model = build(model_type)
    report = assert_alike(model, steps(model)[:1], {"patterns": broken(fault)}, learning_rate=0.01)
    assert not report.rewrites, f"{fault.__name__}: {report}"


@pytest.mark.rest
@pytest.mark.parametrize("model_type", UNSTEADY)
def test_unsteady_ones_train(model_type):
    model = build(model_type)
    history = train(rewriter.optimize(model), steps(model), learning_rate=0.01)
    for loss, gradients in history:
        assert torch.isfinite(loss)
        assert all(g is None or torch.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize("model_type", sorted(UNBUILDABLE))
def test_what_is_left_out_still_fails(model_type):
    """Whoever makes one of them work takes it off the list."""
    with pytest.raises((ImportError, ValueError, TypeError, RuntimeError, KeyError, AttributeError)):
        model = build(model_type)
        model(**batch(model, SHAPES[0])).loss.backward()


def test_the_lists_cover_the_whole_library():
    assert sorted([*TYPES, *UNBUILDABLE]) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(TYPES) >= 186
    assert set(QUICK) | set(UNSTEADY) | set(MISSED) <= set(TYPES) and len(QUICK) == 24
