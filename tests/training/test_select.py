"""With select="measure" a rewrite that is slower than what it replaces is not made, and training goes on the same."""

import copy
import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training.common import assert_same_gradients, assert_trains_alike

import rewriter
from rewriter import Call, Pattern, Reference, decisions, select
from rewriter.timing import Cost, Timing

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test begins with nothing measured."""
    monkeypatch.setenv("REWRITER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def gated(x):
    return x * torch.sigmoid(1.5 * x)


def slow(x):
    """The same, after a product of matrices that nobody looks at: hundreds of times the work."""
    useless = x.detach().reshape(-1)[:1].expand(512, 512) * 0.5
    for _ in range(4):
        useless = useless @ useless / 512
    return gated(x) + useless[0, 0] * 1e-30


def roundabout(x):
    for _ in range(24):
        x = torch.relu(x)
    return x


def fast(x):
    return torch.relu(x)


class Hoards(torch.autograd.Function):
    """Fast as well, but 64 MiB wait for its backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.new_empty(1 << 24))
        return x.relu()

    @staticmethod
    def backward(ctx, dy):
        return dy * (ctx.saved_tensors[0] > 0)


def hoards(x):
    return Hoards.apply(x)


class Made(Pattern):
    """`reference` becomes `call`."""

    def __init__(self, reference, call, name="made"):
        self.name, self.call = name, call
        self.references = (Reference(reference, {"x": (4, 8)}),)

    def __eq__(self, other):
        return self is other

    __hash__ = object.__hash__

    def replacement(self, match):
        return Call(self.call, (match["x"],))


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.up, self.down, self.function = nn.Linear(16, 32), nn.Linear(32, 16), function

    def forward(self, x):
        return x + self.down(self.function(self.up(x)))


class Model(nn.Module):
    def __init__(self, function, layers=2):
        super().__init__()
        self.layers = nn.ModuleList([Layer(function) for _ in range(layers)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def measured(model, pattern, batches=((2, 8, 16),), **options):
    steps = [(torch.randn(shape),) for shape in batches]
    options = {"patterns": ["rms_norm", pattern], "select": "measure", **options}
    return assert_trains_alike(model, steps, options=options)[-1]


def test_a_slow_one_is_refused_with_both_times():
    report = measured(Model(gated), Made(gated, slow), strict=True)  # which is no failure
    assert not report.rewrites and report.coverage() == {"made": (0, 2)}
    (miss,) = {(m.reason, m.choice, m.measured) for m in report.near_misses}
    reason, choice, figures = miss
    assert choice and figures.new_ms > figures.old_ms > 0 and not figures.stored
    assert reason == f"measured slower: {figures.new_ms:.3g} ms for {figures.old_ms:.3g} ms"
    assert figures.at == "float32 [2, 8, 32]" and figures.new_host_ms == 0
    assert reason in str(report).replace("\n", " ")


@pytest.mark.parametrize("mode", ["shipped", "all"])
def test_it_is_made_where_nobody_measures(mode):
    report = measured(Model(gated), Made(gated, slow), select=mode)
    assert report.sites("made") and report.rewrites[0].measured is None


def test_a_fast_one_is_kept_with_both_times():
    report = measured(Model(roundabout), Made(roundabout, fast))
    assert len(report.sites("made")) == 2 and not report.near_misses
    figures = report.rewrites[0].measured
    assert 0 < figures.new_ms < figures.old_ms
    assert json.loads(report.to_json())["rewrites"][0]["measured"]["new_ms"] == figures.new_ms


def test_the_rate_decides_between_time_and_memory():
    reports = [measured(Model(roundabout), Made(roundabout, hoards), memory_rate=r) for r in (0, 1e9)]
    assert reports[0].sites("made") and not reports[1].sites("made")
    kept, left = reports[0].rewrites[0].measured, reports[1].near_misses[0]
    assert kept.new_mib == 64 and kept.old_mib < 1
    assert left.measured.stored and left.measured.new_ms == kept.new_ms  # decided anew, on the same figures
    assert "measured larger: 64 MiB for" in left.reason and "wait for backward" in left.reason


def test_inductor_compiles_both():
    report = measured(Model(gated, 1), Made(gated, slow), executor="inductor")
    assert report.coverage() == {"made": (0, 1)}, report.rewrites
    assert report.near_misses[0].measured.new_ms > report.near_misses[0].measured.old_ms


def test_a_second_length_is_not_measured(monkeypatch):
    calls = count(monkeypatch)
    report = measured(Model(gated), Made(gated, slow), [(2, 8, 16), (2, 12, 16), (2, 20, 16)])
    assert len(calls) == 1 and report.recompiles >= 1 and not report.rewrites


def count(monkeypatch, outcome=None):
    """Sites that are measured from now on; `outcome` in place of measuring."""
    calls, real = [], select.time_site

    def time_site(site, parts, executor):
        calls.append((site.pattern, [p.pattern for p in parts], executor))
        return outcome(site, parts) if outcome else real(site, parts, executor)

    monkeypatch.setattr(select, "time_site", time_site)
    return calls


def fail(site, parts):
    raise torch.OutOfMemoryError("no memory\nand a long story")


def test_an_error_leaves_it_to_the_table(monkeypatch, folder):
    count(monkeypatch, fail)
    report = measured(Model(gated), Made(gated, slow))
    assert len(report.sites("made")) == 2
    note = report.rewrites[0].measured.note
    assert note == "not measured: OutOfMemoryError: no memory" and note in str(report).replace("\n", " ")
    assert not list(folder.rglob("*.json"))
    monkeypatch.setattr(decisions, "DECISIONS", (decisions.Decision("made", "any", "cpu", False, "2 ms for 1"),))
    report = measured(Model(gated), Made(gated, slow))
    assert not report.sites("made") and "2 ms for 1; not measured" in report.near_misses[0].reason


def test_what_only_measuring_runs_into(monkeypatch):
    """The replacement works when proven, and not at the real length."""

    def short(x):
        if type(x) is torch.Tensor and x.shape[1] > 64:
            raise RuntimeError("too long")
        return gated(x)

    model, pattern = Model(gated), Made(gated, short)
    report = rewriter.explain(model, patterns=["rms_norm", pattern], select="measure")(torch.randn(2, 200, 16))
    assert report.rewrites[0].measured.note == "not measured: RuntimeError: too long"


class Normed(nn.Module):
    """A sum and the norm of it, both used."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 16)

    def forward(self, x):
        total = x + self.linear(x)
        return (self.linear(self.norm(total)) + total).square().mean()


def figures(**ms):
    """For each pattern: the times of the rewrite, of the original, and of the original with parts."""

    def outcome(site, parts):
        new, old, *rest = (Cost(t, 0.0, 0) for t in ms[site.pattern])
        return Timing(new, old, rest[0] if parts else None, "")

    return outcome


@pytest.mark.parametrize(
    ("times", "made"),
    [
        ({"add_rms_norm": (1, 3, 2)}, ["add_rms_norm"]),
        ({"add_rms_norm": (2, 3, 1), "rms_norm": (1, 2)}, ["rms_norm"]),  # better than nothing, but not than its part
        ({"add_rms_norm": (3, 1, 2), "rms_norm": (2, 1)}, []),
        ({"add_rms_norm": (3, 2, 1), "rms_norm": (1, 2)}, ["rms_norm"]),
    ],
)
def test_a_composite_is_compared_to_its_parts_too(monkeypatch, times, made):
    calls = count(monkeypatch, figures(**times))
    report = assert_trains_alike(Normed(), [(torch.randn(4, 16),)], options={"select": "measure"})[-1]
    assert [r.pattern for r in report.rewrites] == made
    assert calls[0] == ("add_rms_norm", ["rms_norm"], "eager")
    left = [m for m in report.near_misses if m.pattern == "add_rms_norm"]
    assert len(left) == ("add_rms_norm" not in made)
    if times["add_rms_norm"] == (2, 3, 1):
        assert left[0].reason == "measured slower: 2 ms for 1 ms with rms_norm alone"


def test_parts_are_really_timed():
    report = assert_trains_alike(Normed(), [(torch.randn(4, 16),)], options={"select": "measure"})[-1]
    every = [*report.rewrites, *report.near_misses]
    assert every and all(e.measured.new_ms > 0 and not e.measured.note for e in every)


def test_the_model_is_not_disturbed():
    """Random state, gradients, hooks, grad mode, autocast and a checkpoint around it."""
    torch.manual_seed(3)
    model = Model(nn.Sequential(nn.Dropout(0.3), nn.RMSNorm(32)))
    for parameter in model.layers[0].up.parameters():
        parameter.requires_grad_(False)
    eager, x = copy.deepcopy(model), torch.randn(2, 8, 16)
    for p in (*model.parameters(), *eager.parameters()):
        p.grad = torch.ones_like(p) if p.requires_grad else None
    given = x.clone()
    rewriter.optimize(model, select="measure")
    states = []
    for m in (model, eager):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            loss = checkpoint(m, x, use_reentrant=False) + m(x)
        loss.backward()
        states.append(torch.get_rng_state())
    assert_same_gradients(model, eager)
    assert torch.equal(*states) and torch.equal(x, given)
    report = rewriter.report(model)
    assert report.coverage()["rms_norm"][1] == 2 and not report.fallbacks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    model = Normed()
    with torch.autocast("cpu", torch.bfloat16):
        report = rewriter.explain(model.to(dtype), select="measure")(torch.randn(4, 16, dtype=dtype))
    assert report.coverage()["rms_norm"][1] == 1
    assert all(e.measured.new_ms > 0 for e in [*report.rewrites, *report.near_misses] if e.pattern == "rms_norm")


PLUGIN = """
import torch
from rewriter import Call, Pattern, Reference


def gated(x):
    return x * torch.sigmoid(1.5 * x)


def slow(x):
    useless = x.detach().reshape(-1)[:1].expand(512, 512) * 0.5
    for _ in range(4):
        useless = useless @ useless / 512
    return gated(x) + useless[0, 0] * 1e-30


class Plugged(Pattern):
    name = "plugged"
    references = (Reference(gated, {"x": (4, 8)}),)

    def replacement(self, match):
        return Call(slow, (match["x"],))
"""


def test_measurements_are_kept_until_a_source_changes(tmp_path, monkeypatch, folder):
    file = tmp_path / "plugged.py"
    file.write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    pattern = importlib.import_module("plugged").Plugged()

    def stored():
        torch._dynamo.reset()
        report = rewriter.explain(Model(gated), patterns=["rms_norm", pattern], select="measure")(torch.ones(2, 8, 16))
        return report.near_misses[0].measured.stored

    assert [stored(), stored()] == [False, True]
    file.write_text(PLUGIN + "# another version\n")
    assert [stored(), stored()] == [False, True]
    for stored_file in folder.rglob("*.json"):
        stored_file.write_text("{")
    assert [stored(), stored()] == [False, True]


def test_a_second_process_does_not_time_again(tmp_path):
    (tmp_path / "plugged.py").write_text(PLUGIN)
    program = """
        import torch, rewriter
        from plugged import Plugged, gated

        class Gated(torch.nn.Module):
            def forward(self, x):
                return gated(x)

        model = torch.nn.Sequential(torch.nn.Linear(16, 32), Gated())
        report = rewriter.explain(model, patterns=["rms_norm", Plugged()], select="measure")(torch.ones(8, 16))
        print(report.near_misses[0].measured.stored)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    paths = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": paths}
    said = []
    for _ in range(2):
        command = [sys.executable, "program.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip())
    assert said == ["False", "True"]
