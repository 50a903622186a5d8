"""Wrong arguments are errors that say what is allowed; broken plugins never break a training run."""

import copy
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn
from training.common import assert_trains_alike, step
from training.models import batch, build

import rewriter
from rewriter import library


@pytest.fixture
def linear():
    return nn.Linear(4, 4)


@pytest.mark.parametrize("thing", [None, "gpt2", 3, nn.Linear, len, {}], ids=str)
@pytest.mark.parametrize("call", [rewriter.optimize, rewriter.restore, rewriter.report, rewriter.explain])
def test_not_a_module(call, thing):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        call(thing)


def test_unknown_pattern(linear):
    for options in ({"patterns": ["rms_nrom"]}, {"exclude": ["rms_nrom"]}):
        with pytest.raises(ValueError, match="rms_nrom.*rms_norm"):
            rewriter.optimize(linear, **options)


@pytest.mark.parametrize("options", [{"patterns": "rms_norm"}, {"exclude": "rms_norm"}, {"patterns": [3]}], ids=str)
def test_patterns_of_the_wrong_type(linear, options):
    with pytest.raises(TypeError):
        rewriter.optimize(linear, **options)


@pytest.mark.parametrize("patterns", [7, [None], [object], [nn.ReLU]], ids=str)
def test_patterns_that_are_none(linear, patterns):
    with pytest.raises(TypeError):
        rewriter.optimize(linear, patterns=patterns)


def test_pattern_without_name_or_reference(linear):
    with pytest.raises(ValueError, match="name"):
        rewriter.optimize(linear, patterns=[rewriter.Pattern()])


@pytest.mark.parametrize("reference", [rewriter.Reference(print, {"x": (2, 8)}), 5], ids=["raises", "number"])
def test_reference_that_cannot_be_traced(linear, reference):
    pattern = type("Odd", (rewriter.Pattern,), {"name": "odd", "references": (reference,)})
    with pytest.raises((ValueError, TypeError), match="odd"):
        rewriter.optimize(linear, patterns=[pattern])


@pytest.mark.parametrize("executor", ["cuda", "", None, 3])
def test_unknown_executor(linear, executor):
    with pytest.raises((ValueError, TypeError), match="eager"):
        rewriter.optimize(linear, executor=executor)


def test_other_unknown_values(linear):
    with pytest.raises((ValueError, TypeError), match="first"):
        rewriter.optimize(linear, verify="always")
    with pytest.raises((ValueError, TypeError), match="dynamic"):
        rewriter.optimize(linear, dynamic="yes")
    with pytest.raises(TypeError):
        rewriter.optimize(linear, patern=[])
    with pytest.raises(TypeError, match="patern"):
        rewriter.explain(linear, patern=[])


def test_a_failed_call_leaves_the_model_alone():
    model = build("Llama", use_cache=False, layers=1)
    with pytest.raises(ValueError):
        rewriter.optimize(model, executor="nothing")
    assert not [m for m in model.modules() if "forward" in m.__dict__]
    rewriter.optimize(model)
    with pytest.raises(ValueError):
        rewriter.optimize(model, executor="nothing")
    step(model, batch((2, 16)))
    assert rewriter.report(model).sites("glu")


def test_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="0.weight.*meta"):
        rewriter.optimize(model)


def test_report_of_a_model_never_optimised(linear):
    with pytest.raises(ValueError, match="optimize"):
        rewriter.report(linear)
    assert rewriter.restore(linear) is linear


def test_module_without_parameters_or_blocks():
    for model in (nn.Identity(), nn.Sequential(), nn.Module()):
        assert rewriter.optimize(model) is model
        assert rewriter.report(model).rewrites == ()
    assert torch.equal(rewriter.optimize(nn.Identity())(torch.ones(2)), torch.ones(2))


def test_plugin_that_raises(monkeypatch):
    broken = [
        EntryPoint("gone", "no_such_module:PATTERN", library.ENTRY_POINTS),
        EntryPoint("odd", "math:pi", library.ENTRY_POINTS),
        EntryPoint("missing", "math:PATTERN", library.ENTRY_POINTS),
    ]
    monkeypatch.setattr(library, "entry_points", lambda group: broken)
    library.plugins.cache_clear()
    try:
        _, _, report = assert_trains_alike(build("Llama", use_cache=False, layers=1), [batch((2, 16))])
    finally:
        library.plugins.cache_clear()
    assert len(report.sites("rms_norm")) == 3


def test_models_own_error_stays_its_own():
    model = rewriter.optimize(build("Llama", use_cache=False, layers=1))
    for _ in range(2):
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 4), 10_000), labels=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="nonsense"):
        model.model.norm(nonsense=1)
    assert step(model, batch((2, 16))).loss.isfinite()


def test_strict_names_what_was_left():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6))

    with pytest.raises(rewriter.RewriteError, match="rms_norm.*mean"):
        rewriter.optimize(Odd(), strict=True)(torch.randn(4, 8, requires_grad=True))
    assert rewriter.optimize(Odd())(torch.randn(4, 8)).shape == (4, 8)


def test_a_dynamo_that_fails_leaves_the_model_its_own_code(monkeypatch):
    def compile_to_nothing(function, **options):
        def call(*args, **kwargs):
            raise torch._dynamo.exc.InternalTorchDynamoError("no idea")

        return call

    monkeypatch.setattr(torch, "compile", compile_to_nothing)
    model = torch.nn.Sequential(torch.nn.RMSNorm(8), torch.nn.Linear(8, 8))
    eager = copy.deepcopy(model)
    x = torch.randn(4, 8)
    for _ in range(2):
        assert torch.equal(rewriter.optimize(model)(x), eager(x))
    (fallback,) = rewriter.report(model).fallbacks
    assert "no idea" in fallback.reason and fallback.count == 1
