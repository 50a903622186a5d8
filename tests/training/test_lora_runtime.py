"""What people do with adapters after `optimize`, with the pattern `lora` on: it goes on as PEFT alone does."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from training.common import TOLERANCE, assert_same_gradients, assert_trains_alike, relative, step
from training.models import batch, build

import rewriter

BATCH, OTHER = batch((2, 16)), batch((3, 24), 1)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def fill(model):
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)


def adapted(targets=TARGETS, **options):
    model = build("Llama", layers=1, use_cache=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options))
    fill(model)
    return model.train()


@pytest.fixture
def pair():
    model = adapted()
    eager = copy.deepcopy(model)
    rewriter.optimize(model)
    for m in (model, eager):
        step(m, BATCH)
        m.zero_grad()
    assert len(rewriter.report(model).sites("lora")) == 3
    return model, eager


def assert_trains_like(new, old, inputs=BATCH):
    losses = []
    for m in (new, old):
        m.zero_grad()
        losses.append(step(m, inputs).loss)
    assert relative(*losses) <= TOLERANCE
    assert_same_gradients(new, old)


def graphs_of_the_block(model):
    return sum(r.graphs for r in rewriter.report(model).regions if r.kind == "block")


def add(model, name, targets=("q_proj", "up_proj"), **options):
    model.add_adapter(name, LoraConfig(r=3, target_modules=list(targets), task_type="CAUSAL_LM", **options))
    fill(model)


def test_switched_to_and_fro(pair):
    model, _ = pair
    for m in pair:
        add(m, "second", lora_alpha=3)
    counts = []
    for _ in range(3):
        for name in ("second", "default"):
            for m in pair:
                m.set_adapter(name)
            assert_trains_like(*pair)
        counts.append(graphs_of_the_block(model))
    assert counts[0] <= 3 and counts == counts[:1] * 3  # one for each, and none when one comes back
    assert [r for r in rewriter.report(model).regions if r.kind == "block"][0].recompiles == counts[0] - 1
    assert not rewriter.report(model).fallbacks
    up = "base_model.model.model.layers.0.mlp.up_proj"
    assert up in rewriter.report(model).sites("lora")  # which only the second one has


def test_scale_that_changes(pair):
    """As a schedule does it: a number that is another one each time comes into the graph."""
    model, _ = pair
    for scale in (0.5, 3.0, 1.25, 0.1):
        for m in pair:
            for layer in m.modules():
                if hasattr(layer, "lora_A"):
                    layer.scaling["default"] = scale
        assert_trains_like(*pair)
    report = rewriter.report(model)
    assert graphs_of_the_block(model) == 2
    assert [r.details["factors"] for r in report.rewrites if "factors" in r.details] == [
        "tensors"
    ] * 2  # queries and values in one call
    assert len(report.sites("lora")) == 3


def test_two_at_once(pair):
    model, _ = pair
    for m in pair:
        add(m, "second", ("q_proj", "v_proj"), lora_alpha=12)
        m.base_model.set_adapter(["default", "second"])
    assert_trains_like(*pair)
    together = [r.details for r in rewriter.report(model).rewrites if r.details.get("adapters") == 2]
    assert together and together[0]["rank"] == 7
    for m in pair:
        m.base_model.set_adapter("default")
    assert_trains_like(*pair)


def test_disabled_and_merged(pair):
    model, _ = pair
    counts = []
    for _ in range(2):
        losses = []
        for m in pair:
            with m.disable_adapter():
                losses.append(m(**OTHER).loss)
        assert relative(*losses) <= TOLERANCE
        for m in pair:
            m.merge_adapter()
        losses += [m(**OTHER).loss for m in pair]
        assert relative(*losses[2:]) <= TOLERANCE and relative(losses[0], losses[2]) > 1e-3
        for m in pair:
            m.unmerge_adapter()
        assert_trains_like(*pair)
        assert_trains_like(*pair, OTHER)
        counts.append(graphs_of_the_block(model))
    assert counts[0] == counts[1] and not rewriter.report(model).fallbacks


def test_deleted(pair):
    for m in pair:
        add(m, "second")
        m.set_adapter("second")
    assert_trains_like(*pair)
    for m in pair:
        m.delete_adapter("default")
    assert_trains_like(*pair)
    assert not [n for n, _ in pair[0].named_parameters() if ".default." in n]


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_unloaded(pair, how):
    plain = [getattr(m, how)().train() for m in pair]
    for m in plain:
        m.requires_grad_(True)
    assert_trains_like(*plain)
    assert_trains_like(rewriter.restore(plain[0]), plain[1])


def test_what_trains_changes(pair):
    """A frozen B or A, a layer that trains beside its adapter, and all of it back."""
    choices = ("lora_A", "lora_B", "lora_", "q_proj", "layernorm")
    for chosen in choices:
        for m in pair:
            for name, parameter in m.named_parameters():
                parameter.requires_grad_(chosen in name)
        assert_trains_like(*pair)


def test_evaluated_between_steps(pair):
    for _ in range(2):
        losses = []
        for m in pair:
            m.eval()
            with torch.no_grad():
                losses.append(m(**OTHER).loss)
            m.train()
        assert relative(*losses) <= TOLERANCE
        assert_trains_like(*pair)


def test_optimizers_from_before_and_after(tmp_path):
    """Steps of optimizers that hold the parameters since before, or since after, `optimize`; then all that is saved."""
    model = adapted(modules_to_save=["lm_head"])
    eager = copy.deepcopy(model)
    names = [n for n, _ in model.named_parameters()]
    before = {n: id(p) for n, p in model.named_parameters()}
    optimizers = [[torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)] for m in (model, eager)]
    rewriter.optimize(model)
    for number in range(4):
        if number == 2:
            for m, own in zip((model, eager), optimizers, strict=True):
                own.append(torch.optim.SGD([p for n, p in m.named_parameters() if "lora_B" in n], lr=0.1))
        assert_trains_like(model, eager)
        for own in optimizers:
            own[-1].step()
    assert {n: id(p) for n, p in model.named_parameters()} == before and list(before) == names
    assert list(model.state_dict()) == list(eager.state_dict())
    moved = [n for n, p in eager.named_parameters() if "lora_B" in n]
    for name, parameter in model.named_parameters():
        other = eager.get_parameter(name)
        assert parameter.requires_grad == other.requires_grad
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6, msg=name)
    assert len(moved) == 3

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("Llama", layers=1, use_cache=False), tmp_path).eval()
    with torch.no_grad():
        new, own = (m.eval()(**OTHER).logits for m in (loaded, model))
        assert relative(new, own) <= TOLERANCE
        merged = model.train().merge_and_unload().eval()
        assert relative(merged(**OTHER).logits, new) <= TOLERANCE


def test_restored(pair):
    model, eager = pair
    assert rewriter.restore(model) is model
    assert not [m for m in model.modules() if "forward" in m.__dict__ or "_rewriter_attachment" in m.__dict__]
    outputs = [step(m, BATCH) for m in pair]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for new, old in zip(model.parameters(), eager.parameters(), strict=True):
        assert (new.grad is None) == (old.grad is None)
        assert old.grad is None or torch.equal(new.grad, old.grad)


def test_copied(pair):
    model, eager = pair
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for m in (copied, eager):
            for name, parameter in m.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.5)
    assert_trains_like(copied, eager)
    assert {id(p) for p in copied.parameters()}.isdisjoint(map(id, model.parameters()))


def test_other_weights_for_one_call(pair):
    results = []
    for m in pair:
        weights = {n: p.detach() * 1.5 for n, p in m.named_parameters() if "lora_" in n}
        rest = {n: p.detach() for n, p in m.named_parameters() if "lora_" not in n}

        def loss(weights, m=m, rest=rest):
            return torch.func.functional_call(m, {**rest, **weights}, (), BATCH).loss

        results.append((loss(weights), torch.func.grad(loss)(weights)))
    assert relative(results[0][0], results[1][0]) <= TOLERANCE
    assert all(relative(g, results[1][1][n]) <= TOLERANCE for n, g in results[0][1].items())


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_comes_and_goes(adapters):
    """Each step in another precision than the one before: as exact as eager, twice."""
    model = adapted().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    eager = copy.deepcopy(model)
    rewriter.optimize(model)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = [step(m, BATCH).loss.detach() for m in (model, eager)]
        assert relative(*losses) <= 1e-2
        for (name, new), old in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert (new.grad is None) == (old.grad is None), name
            if old.grad is not None:
                assert new.grad.dtype == old.grad.dtype and relative(new.grad, old.grad) <= 0.05, name
    assert len(rewriter.report(model).sites("lora")) == 3


HOOKS = {
    "changes what B gives": lambda layer, _: layer.lora_B["default"].register_forward_hook(lambda _, a, y: y * 1.5),
    "changes what A sees": lambda layer, _: layer.lora_A["default"].register_forward_pre_hook(lambda _, a: a[0] / 2),
    "changes the layer": lambda layer, _: layer.base_layer.register_forward_hook(lambda _, a, y: y + 1),
    "reads what A gives": lambda layer, seen: layer.lora_A["default"].register_forward_hook(
        lambda _, a, y: seen.append(y.detach().sum())
    ),
    "changes a gradient": lambda layer, _: layer.lora_A["default"].weight.register_hook(lambda g: g * 3),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_come_later(pair, hook):
    seen = [], []
    for m, own in zip(pair, seen, strict=True):
        HOOKS[hook](m.base_model.model.model.layers[0].self_attn.q_proj, own)
    assert_trains_like(*pair)
    torch.testing.assert_close(*seen)
    assert len(seen[0]) == hook.startswith("reads")


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 5)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        h = self.first(x)
        return self.last(self.attention(h, h, h)[0]).square().mean()


def test_adapter_that_is_merged_for_each_forward():
    """PEFT puts the weights back whenever the names of such a module's parts are asked for: nobody may, in between."""
    model = get_peft_model(Attentive(), LoraConfig(r=2, target_modules=["attention"])).train()
    fill(model)
    assert_trains_alike(model, [(torch.randn(2, 4, 8),)] * 2)
