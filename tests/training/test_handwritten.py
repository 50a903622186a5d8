"""Hand-written transformers get the same treatment as those of a library."""

import copy
from contextlib import nullcontext

import pytest
import torch
from training import handwritten, unruly
from training.common import assert_trains_alike, near_truth
from training.handwritten import LAYERS, VOCABULARY

import rewriter

# Queries and keys are turned in one call.
ALL = dict(rms_norm=2 * LAYERS + 1, rotary=LAYERS, glu=LAYERS, attention=LAYERS, linear_cross_entropy=1)
MODELS = {
    handwritten.OneForward: ALL,
    handwritten.BodyAndHead: ALL,
    handwritten.Stacked: ALL,
    handwritten.Checkpointed: ALL,
    handwritten.Functional: ALL,
    # complex numbers; the loss is in a wrapper, which Dynamo captures apart from the head
    handwritten.Outer: {**ALL, "linear_cross_entropy": 0, "cross_entropy": 1},
    handwritten.TwoStacks: dict(
        rms_norm=4 * LAYERS + 2,
        rotary=2 * LAYERS,
        glu=2 * LAYERS,
        attention=3 * LAYERS,
        linear_cross_entropy=1,
    ),  # fmt: skip
    unruly.InPlace: {**ALL, "linear_cross_entropy": 0},  # the logits are written in place
    unruly.Remembering: ALL,
    unruly.Early: {**ALL, "rms_norm": 3 * LAYERS, "linear_cross_entropy": LAYERS},
}
UNRULY = [unruly.Talkative, unruly.Deciding]


def steps():
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randint(0, VOCABULARY, shape, generator=generator) for _ in range(2))
        for shape in [(2, 16), (3, 24), (2, 20)]
    ]


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_trains_the_same_and_finds_everything(kind):
    _, _, report = assert_trains_alike(kind(), steps())
    assert not report.fallbacks
    found = {name: len(report.sites(name)) for name in MODELS[kind]}
    assert found == MODELS[kind], report.near_misses


@pytest.mark.parametrize("kind", UNRULY, ids=lambda kind: kind.__name__)
def test_graph_breaks_are_survived_and_reported(kind, capsys):
    model, eager, report = assert_trains_alike(kind(), steps())
    assert report.sites("rms_norm") and report.sites("glu")
    assert report.graph_breaks, "nothing in the report says that the forward was captured in pieces"
    assert getattr(model, "calls", 0) == getattr(eager, "calls", 0)


@pytest.mark.parametrize("kind", [*MODELS, *UNRULY], ids=lambda kind: kind.__name__)
def test_bf16_weights(kind):
    near_truth(kind().bfloat16(), steps()[:1], nullcontext, floor=5e-3)


@pytest.mark.parametrize("kind", [handwritten.OneForward, handwritten.BodyAndHead], ids=lambda kind: kind.__name__)
def test_logits_are_the_models_own(kind):
    model = kind()
    eager = copy.deepcopy(model)
    for m in (model, eager):
        m.seen = m(*steps()[0]) if m is eager else rewriter.optimize(m)(*steps()[0])
    new, old = ((m.seen["logits"] if isinstance(m.seen, dict) else m.seen[0]) for m in (model, eager))
    assert new.shape == old.shape and new.dtype == old.dtype and new.requires_grad == old.requires_grad
    torch.testing.assert_close(new + 0, old + 0)
    torch.testing.assert_close(new.argmax(-1), old.argmax(-1))


def test_remembered_states_are_the_models_own():
    model, eager, _ = assert_trains_alike(unruly.Remembering(), steps())
    for new, old in zip(model.states, eager.states, strict=True):
        assert type(new) is torch.Tensor
        torch.testing.assert_close(new, old)


def test_a_callers_write_to_what_a_block_read_is_loud():
    """As in any compiled block: a write outside of the graph to what it saved stops backward, never falsifies it."""
    model = rewriter.optimize(unruly.InPlaceOutside())
    with pytest.raises(RuntimeError, match="inplace operation"):
        model(*steps()[0]).backward()


def test_torch_compile_backend():
    model = handwritten.BodyAndHead()
    eager = copy.deepcopy(model)
    ids, targets = steps()[0]
    torch.compile(model, backend="rewriter")(ids, targets)["loss"].backward()
    eager(ids, targets)["loss"].backward()
    for new, old in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(new.grad, old.grad, rtol=1e-4, atol=1e-6)
