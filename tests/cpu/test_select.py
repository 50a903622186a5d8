"""Which rewrites pay: the policy on given figures, the shipped table, and measurements kept on disk."""

import dataclasses
import functools
import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import rewriter
from rewriter import cache, decisions, fingerprint, library, render, select, timing
from rewriter.decisions import decision
from rewriter.load import report_from_dict
from rewriter.report import Measured, NearMiss, RegionReport, Rewrite, RewriteReport
from rewriter.select import loses
from rewriter.timing import Cost, bytes_kept

RESULTS = Path(__file__).parents[2] / "bench" / "results"
GIB = 2**30
CPU = torch.device("cpu")


def cost(ms, kept=0, host=0.0, noise=0.0):
    return Cost(ms, host, kept, noise)


@pytest.mark.parametrize(
    ("new", "old", "rate", "expected"),
    [
        (cost(0.5), cost(1.0), 0, False),
        (cost(2.0), cost(1.0), 0, True),
        (cost(1.02), cost(1.0), 0, False),  # a tie
        (cost(1.05), cost(1.0), 0, True),
        (cost(1.05), cost(1.0, noise=0.08), 0, False),  # it scatters
        (cost(1.2), cost(1.0, noise=0.5), 0, True),  # but that is no tie
        (cost(1.5), cost(1.0, GIB), 0.1, True),
        (cost(1.5), cost(1.0, GIB), 1.0, False),  # a GiB less is worth it
        (cost(0.5, GIB), cost(1.0), 0, False),
        (cost(0.5, GIB), cost(1.0), 5, True),
        (cost(0.1, host=0.9), cost(0.3, host=0.2), 0, True),  # the device would wait for launches
        (cost(0.1, host=0.3), cost(0.3, host=0.2), 0, False),
        (cost(5.0, host=0.9), cost(6.0, host=0.2), 0, False),  # the host is far ahead
        (cost(0.1, host=0.2), cost(0.3, host=0.9), 0, False),
    ],
)
def test_what_loses(new, old, rate, expected):
    assert loses(new, old, rate) is expected


def test_the_table_names_patterns_and_files_that_exist():
    for row in decisions.DECISIONS:
        assert row.pattern in library.BUILT_IN and row.figures
        assert row.executor in ("eager", "inductor", "any")
        assert not row.source or (RESULTS / row.source).is_file(), row.source


def test_what_was_not_measured_is_rewritten():
    row = decision("rms_norm", "inductor", CPU)
    assert row.apply and "not measured" in row.figures and not row.source


def test_a_row_for_a_library_speaks_of_no_other_place(monkeypatch):
    row = decisions.Decision("glu", "any", "cpu", False, "slow", library=True)
    monkeypatch.setattr(decisions, "DECISIONS", (row,))
    assert decision("glu", "eager", CPU, library=True) is row
    assert decision("glu", "eager", CPU).apply


def test_a_row_speaks_of_its_executor_and_device(monkeypatch):
    rows = [decisions.Decision("glu", e, d, False, f"{e} {d}") for e, d in (("inductor", "cpu"), ("eager", "cuda"))]
    monkeypatch.setattr(decisions, "DECISIONS", tuple(rows))
    assert decision("glu", "inductor", CPU) is rows[0]
    assert decision("glu", "eager", CPU).apply


def test_shipped_rows_hold_but_where_all_is_asked_for(monkeypatch):
    monkeypatch.setattr(decisions, "DECISIONS", (decisions.Decision("rms_norm", "any", "cpu", False, "2 ms for 1"),))
    model, x = nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 2)), torch.randn(3, 16)
    report = rewriter.explain(model, strict=True)(x)
    (miss,) = report.near_misses
    assert miss.choice and miss.measured is None and "2 ms for 1" in miss.reason
    assert rewriter.explain(model, select="all")(x).sites("rms_norm") == ["0"]


@pytest.mark.parametrize("device_row", [True, False])
def test_a_librarys_own_operator_stays_where_the_table_says_so(monkeypatch, device_row):
    if not device_row:
        monkeypatch.setattr(decisions, "DECISIONS", ())
    report = rewriter.explain(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 2)))(torch.randn(3, 16))
    assert [k.call for k in report.kept] == (["layer_norm"] if device_row else [])
    assert report.sites("layer_norm") == ["0"]


def test_wrong_values_say_what_is_allowed():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="shipped, measure, all"):
        rewriter.optimize(model, select="fastest")
    for wrong in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="memory_rate"):
            rewriter.optimize(model, memory_rate=wrong)
    for wrong in ("1", None, True):
        with pytest.raises(TypeError, match="memory_rate"):
            rewriter.explain(model, memory_rate=wrong)


# ---- bytes that wait for backward


class Hidden(torch.autograd.Function):
    """Keeps one tensor as it should be kept, and one in an attribute."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.exp())
        ctx.more = [x.new_zeros(100)]
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def test_bytes_kept_are_distinct_storages_without_the_inputs():
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    assert bytes_kept(lambda: [x * w], [x, w]) == 0
    assert bytes_kept(lambda: [x * w], [w]) == x.nbytes
    assert bytes_kept(lambda: [(x.exp() * w).sin()], [x, w]) == 2 * x.nbytes  # exp's result is kept twice, once in all
    assert bytes_kept(lambda: [Hidden.apply(x).relu()], [x]) == x.nbytes + 400 + x.nbytes


def test_a_measurement_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(timing, "LONGEST", 0.01)
    go_on = threading.Event()
    with pytest.raises(timing.Unmeasured, match="more than"):
        timing._apart(go_on.wait)
    go_on.set()


# ---- on disk


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REWRITER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_stored_comes_back(folder):
    assert cache.load({"a": 1}) is None
    cache.store({"a": 1}, {"ms": 0.5})
    assert cache.load({"a": 1}) == {"ms": 0.5} and cache.load({"a": 2}) is None
    assert len(list(folder.rglob("*"))) == 2  # a folder and the file: nothing temporary is left


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"key": {"a": 2}, "value": {}}', b'{"key": {"a": 1}}']
)
def test_a_broken_file_is_as_good_as_none(folder, content):
    cache.store({"a": 1}, {"ms": 0.5})
    (file,) = folder.rglob("*.json")
    file.write_bytes(content)
    assert cache.load({"a": 1}) is None
    cache.store({"a": 1}, {"ms": 0.7})
    assert cache.load({"a": 1}) == {"ms": 0.7}


def test_a_folder_that_can_not_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REWRITER_CACHE_DIR", str(tmp_path / "file"))
    cache.store({"a": 1}, {"ms": 0.5})
    assert cache.load({"a": 1}) is None


def test_the_platforms_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("REWRITER_CACHE_DIR", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "rewriter"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory() == Path.home() / ".cache" / "rewriter"


@pytest.mark.parametrize("change", [{"new": 3}, {"new": {"ms": "1"}}, {"old": None}, {"parts": {"ms": -1}}], ids=str)
def test_stored_figures_that_are_none_are_not_taken(change):
    timing = select.Timing(cost(1.0), cost(2.0, 5, 1.0, 0.1), None, "float32 [2]")
    stored = json.loads(json.dumps(dataclasses.asdict(timing)))
    assert select._read(stored) == timing
    assert select._read({**stored, **change}) is None


# ---- sources


def test_sources_of_a_pattern_are_its_own_and_its_kernels(tmp_path, monkeypatch):
    package = tmp_path / "someones"
    package.mkdir()
    for name, text in {"__init__": "", "deep": "A = 1\n", "kernel": "def f():\n    from someones import deep\n",
                       "other": "", "pattern": "from .kernel import f\n\n\nclass P:\n    pass\n"}.items():  # fmt: skip
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    from someones.pattern import P, f

    before = fingerprint.sources([P, functools.partial(f, 1), torch.relu])
    assert before is not None and before == fingerprint.sources([f, P])
    (package / "other.py").write_text("B = 1\n")
    assert fingerprint.sources([P, f]) == before
    (package / "deep.py").write_text("A = 2\n")
    assert fingerprint.sources([P, f]) != before
    for name in [n for n in sys.modules if n.partition(".")[0] == "someones"]:
        monkeypatch.delitem(sys.modules, name)


def test_built_in_patterns_have_sources():
    prints = {name: fingerprint.sources([type(pattern)]) for name, pattern in library.built_in().items()}
    assert None not in prints.values() and len(set(prints.values())) == len(prints)


def test_a_function_that_was_typed_in_has_none():
    space = {"__name__": "typed_in"}
    exec("def f(): pass", space)
    assert fingerprint.sources([space["f"]]) is None


# ---- the report


FIGURES = Measured(2.0, 1.5, 0.3, 0.25, 64.0, 32.0, "rms_norm", "bfloat16 [2, 8]", True)


@pytest.mark.parametrize("view", [render.text, render.markdown, render.html])
def test_views_have_the_figures(view):
    slow = dataclasses.replace(FIGURES, new_ms=4.0)
    done = Rewrite("add_rms_norm", ("a.norm",), "fused", {}, 3, (), measured=FIGURES)
    unknown = Rewrite("glu", ("a.mlp",), "fused", {}, 3, (), measured=Measured(note="not measured: no clock"))
    left = NearMiss("rotary", ("a.attention",), select.sentence(slow), "mul", "q * cos", True, slow)
    report = RewriteReport((done, unknown), (left,), (RegionReport(("a",), "block", 1, 0),), (), (), (), {})
    shown = view(report).replace("\\", "")
    for text in ("1.5 ms (2)", "32 MiB kept (64)", "host 0.25 ms (0.3)", "bfloat16 [2, 8]", "measured before",
                 "not measured: no clock", "measured slower: 4 ms for 2 ms", "1 place left, as it does not pay",
                 "0 near misses", "original with rms_norm"):  # fmt: skip
        assert text in shown, text
    assert report_from_dict(json.loads(report.to_json())) == report


def test_sentences():
    assert select.sentence(dataclasses.replace(FIGURES, new_ms=4.0)).startswith(
        "measured slower: 4 ms for 2 ms with rms"
    )
    launched = dataclasses.replace(FIGURES, new_host_ms=3.0, against="")
    assert select.sentence(launched).startswith("measured slower to launch: 3 ms of the host for 0.3 ms, 1.5 ms of")
    larger = dataclasses.replace(FIGURES, new_mib=640.0, against="")
    assert select.sentence(larger) == "measured larger: 640 MiB for 64 MiB wait for backward, 1.5 ms for 2 ms"
