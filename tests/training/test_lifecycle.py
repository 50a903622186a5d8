"""What people do with a model after it was optimised: it must go on as if nothing had happened."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from training.common import TOLERANCE, assert_same_gradients, assert_trains_alike, relative, step
from training.models import batch, batches, build

import rewriter

BATCH = batch((2, 16))


@pytest.fixture
def pair():
    """An optimised model that has trained one step, and its eager copy that did the same."""
    model = build("Llama", use_cache=False)
    eager = copy.deepcopy(model)
    rewriter.optimize(model)
    for m in (model, eager):
        step(m, BATCH)
        m.zero_grad()
    return model, eager


def assert_trains_like(new, old):
    for m in (new, old):
        m.zero_grad()
        step(m, BATCH)
    assert_same_gradients(new, old)


def traces(model):
    return [k for m in model.modules() for k in m.__dict__ if k == "forward" or "rewriter" in k]


def test_eval_and_generate(pair):
    outputs = []
    for m in pair:
        m.eval()
        with torch.no_grad():
            outputs.append(m(**batch((3, 24), 1)))
    assert relative(outputs[0].loss, outputs[1].loss) <= TOLERANCE
    assert relative(outputs[0].logits + 0, outputs[1].logits) <= TOLERANCE
    tokens = [m.generate(BATCH["input_ids"], max_new_tokens=8, do_sample=False) for m in pair]
    assert torch.equal(*tokens)
    for m in pair:
        m.train()
    assert_trains_like(*pair)


def test_copies_train_and_can_be_restored(pair):
    model, eager = pair
    copied = copy.deepcopy(model)
    assert_trains_like(copied, eager)
    assert rewriter.restore(copied) is copied
    assert not traces(copied) and traces(model)
    assert_trains_like(copied, eager)
    assert_trains_like(model, eager)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_saved_whole(pair, save):
    model, eager = pair
    if save == "torch":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    else:
        loaded = pickle.loads(pickle.dumps(model))
    assert_trains_like(loaded, eager)
    assert_trains_like(rewriter.optimize(loaded), eager)
    assert len(rewriter.report(loaded).sites("rms_norm")) == 5
    assert not traces(rewriter.restore(loaded))


def test_state_dict(pair):
    model, eager = pair
    assert list(model.state_dict()) == list(eager.state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = build("Llama", seed=5, use_cache=False)
    fresh.load_state_dict(torch.load(file))
    assert_trains_like(fresh, eager)
    model.load_state_dict(build("Llama", seed=6).state_dict())
    eager.load_state_dict(build("Llama", seed=6).state_dict())
    assert_trains_like(model, eager)


def test_save_pretrained(pair, tmp_path):
    model, eager = pair
    model.save_pretrained(tmp_path)
    assert_trains_like(type(model).from_pretrained(tmp_path).train(), eager)


def test_hooks_on_inner_modules(pair):
    calls, results = [], []
    for m in pair:
        seen = []
        block = m.model.layers[1]
        block.mlp.register_forward_hook(lambda _, a, o, seen=seen: seen.append("mlp"))
        block.input_layernorm.register_forward_pre_hook(lambda _, a, seen=seen: seen.append("norm"))
        block.mlp.register_full_backward_hook(lambda _, i, o, seen=seen: seen.append("mlp backward"))
        block.input_layernorm.register_full_backward_hook(lambda _, i, o, seen=seen: seen.append("norm backward"))
        block.register_forward_hook(lambda _, a, o, seen=seen: seen.append("block"))
        m.model.norm.register_forward_hook(lambda _, a, o, seen=seen: seen.append("last"))
        m.lm_head.register_forward_hook(lambda _, a, o, seen=seen: seen.append("head"))
        m.model.embed_tokens.register_forward_hook(lambda _, a, o: o * 1.5)
        block.self_attn.register_forward_hook(lambda _, a, o: o[0].register_hook(lambda g: g * 2) and None)
        results.append(step(m, BATCH).loss)
        calls.append(seen)
    assert calls[0] == calls[1] and len(calls[0]) == 7
    assert_same_gradients(*pair)


def test_signature(pair):
    model, eager = pair
    assert inspect.signature(model.forward) == inspect.signature(eager.forward)
    assert inspect.signature(model.model.layers[0].forward) == inspect.signature(eager.model.layers[0].forward)


def test_restored_is_bit_equal_and_clean():
    model = build("Gemma2")
    before = [list(m.__dict__) for m in model.modules()]
    eager = copy.deepcopy(model)
    step(rewriter.optimize(model), BATCH)
    model.zero_grad()
    rewriter.restore(model)
    assert [list(m.__dict__) for m in model.modules()] == before
    outputs = [step(m, BATCH) for m in (model, eager)]
    assert torch.equal(outputs[0].loss, outputs[1].loss) and torch.equal(outputs[0].logits, outputs[1].logits)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), eager.parameters(), strict=True))
    with pytest.raises(ValueError):
        rewriter.report(model)


def test_optimised_twice_is_once(pair):
    model, eager = pair
    attached = [m.__dict__.get("forward") for m in model.modules()]
    assert rewriter.optimize(model) is model
    assert [m.__dict__.get("forward") for m in model.modules()] == attached
    assert rewriter.report(model).sites("glu")
    assert_trains_like(model, eager)
    rewriter.optimize(model, exclude=["glu"])
    assert_trains_like(model, eager)
    assert not rewriter.report(model).sites("glu")
    assert not traces(rewriter.restore(model))


def test_gradient_accumulation(pair):
    for m in pair:
        for number in range(2):
            step(m, batch((2, 16 + 8 * number), number))
    assert_same_gradients(*pair)


def test_frozen_and_thawed_parameters(pair):
    for frozen in ("mlp", "norm", "embed", "lm_head"):
        for m in pair:
            for name, parameter in m.named_parameters():
                parameter.requires_grad_(frozen not in name)
        assert_trains_like(*pair)


def test_explain_leaves_no_trace():
    model = build("Llama", use_cache=False)
    before = [list(m.__dict__) for m in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    report = rewriter.explain(model)(**BATCH)
    assert report.coverage()["rms_norm"] == (5, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert [list(m.__dict__) for m in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())


def test_functional_call(pair):
    results = []
    for m in pair:
        weights = {n: p.detach() * 1.5 for n, p in m.named_parameters()}

        def loss(weights, m=m):
            return torch.func.functional_call(m, weights, (), BATCH).loss

        results.append((loss(weights), torch.func.grad(loss)(weights)))
    assert relative(results[0][0], results[1][0]) <= TOLERANCE
    assert all(relative(g, results[1][1][n]) <= TOLERANCE for n, g in results[0][1].items())


def test_three_lengths_then_eval_then_train():
    model, eager, _ = assert_trains_alike(build("Mistral", use_cache=False), batches())
    for m in (model, eager):
        m.eval()(**BATCH)
        m.train()
    assert_trains_like(model, eager)
