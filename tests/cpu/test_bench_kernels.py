"""The kernel benchmarks run, count and judge; on a CPU with tiny shapes, where times mean nothing."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
CANDIDATES = ["ours", "ours, compiled", "eager", "torch.compile"]


def load(path):
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)  # so that what the module adds to the path is taken back
    return load(BENCH / "kernels" / "measure.py")


@pytest.fixture
def verdict():
    return load(BENCH / "kernels" / "verdict.py")


def run(script, *options, out):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OUT": str(out)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, BENCH / "kernels" / script, *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def measured(family, out, *options):
    """The JSON of one family."""
    done = run(f"{family}.py", "--device", "cpu", *options, out=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / f"{family}.json").read_text())


# family: the variants that a run without arguments has, and the bytes of the first of them, by hand
FAMILIES = {
    "rms_norm": (
        {"weight", "add", "1 + w", "no weight", "per head"},
        {"forward": 2 * (2 * 16 * 64 + 64), "backward": 2 * (3 * 16 * 64 + 2 * 64)},
    ),
    "layer_norm": (
        {"weight and bias", "add", "no weight"},
        {"forward": 2 * (2 * 16 * 64 + 2 * 64), "backward": 2 * (3 * 16 * 64 + 3 * 64)},
    ),
    "rotary": (
        {"halves", "interleaved", "partial"},
        dict.fromkeys(("forward", "backward"), 2 * (2 * 4 * 8 * (4 + 2) * 16 + 2 * 8 * 16)),
    ),
    "glu": (
        {"silu", "silu, packed", "gelu_tanh", "gelu_tanh, packed", "gelu"},
        {"forward": 2 * 3 * 16 * 32, "backward": 2 * 5 * 16 * 32},
    ),
    "cross_entropy": (
        {"mean", "rows", "loss", "soft cap"},
        {"forward": 2 * 16 * 97, "backward": 2 * 2 * 16 * 97},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family, tmp_path):
    variants, counted = FAMILIES[family]
    candidates = CANDIDATES if family == "glu" else ["ours", "eager"]  # compiling takes the most time
    results = measured(family, tmp_path, *([] if candidates is CANDIDATES else ["--names", ",".join(candidates)]))
    rows = results["rows"]
    assert {row["variant"] for row in rows} == variants
    assert [row["name"] for row in rows] == candidates * len(variants)
    assert rows[0]["bytes"] == counted
    assert results["misses"] == [] and results["not_compiled"] == []
    assert results["device"] and {"torch", "triton"} <= set(results["versions"])
    for row in rows:
        assert row["good"] and all(math.isfinite(e) and e < 1e-2 for pair in row["errors"] for e in pair)
        assert set(row["of_copy"]) == set(row["GB/s"]) == set(row["copy_ms"]) == set(row["bytes"])
        assert all(
            math.isfinite(v) and v > 0 for key in ("of_copy", "GB/s", "copy_ms", "ms") for v in row[key].values()
        )
        assert set(row["targets"]) <= set(row["bytes"]) and row["targets"]
        assert row["ms"]["both"] == pytest.approx(sum(ms for part, ms in row["ms"].items() if part != "both"))


def test_head(tmp_path):
    rows = measured("linear_cross_entropy", tmp_path)["rows"]
    assert {("ours", False), ("ours", True), ("eager", True)} <= {(row["name"], row["trained"]) for row in rows}
    for row in rows:
        assert "error" not in row and math.isfinite(row["of matmuls"])
        assert all(e < 1e-2 for pair in row["errors"] for e in pair)


def test_adapters(tmp_path):
    rows = measured("lora", tmp_path)["rows"]
    assert {row["name"] for row in rows} == {"frozen matmuls", "in place", *CANDIDATES}
    for row in rows:
        assert all(math.isfinite(f) for f in row.get("of_frozen", ())) and row["forward_ms"] > 0
        assert all(e < 1e-2 for pair in row.get("errors", ()) for e in pair)


def test_unpacking(tmp_path):
    rows = measured("dequantize_4bit", tmp_path)["rows"]
    assert len(rows) == 9 and not any("error" in row for row in rows)
    plain = next(row for row in rows if not row["nested"] and row["dtype"] == "bfloat16")
    assert plain["bytes"] == 64 * 64 // 2 + 64 * 64 // 64 * 4 + 64 * 64 * 2
    assert all(share > 0 for row in rows for share in row["of a copy"].values())


def test_attention(tmp_path):
    configs = measured("attention", tmp_path)["configs"]
    assert len(configs) == 4 and "sdpa" in configs["plain"]
    for config in configs.values():
        assert config["this"]["numbers"]["good"] and math.isfinite(config["dense"]["both_tflops"])


def test_a_family_that_takes_too_long_does_not_end_the_run(tmp_path):
    done = run("all.py", "--device", "cpu", "--families", "lora,glu", "--limit", "0.2", out=tmp_path)
    assert done.returncode == 1
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[-2:]] == ["lora", "glu"]
    assert done.stdout.count("not done after 0.2 s") == 2


def test_a_family_that_is_not_there_is_refused(tmp_path):
    done = run("all.py", "--families", "glu,gelu", out=tmp_path)
    assert done.returncode == 2 and "no such family: gelu" in done.stderr


def test_options_restrict_what_is_measured(tmp_path):
    options = {"only": "no-weight", "names": "ours,eager", "shapes": "32,48", "dtypes": "float32", "device": "cpu"}
    done = run("rms_norm.py", *(f"--{name}={value}" for name, value in options.items()), out=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rms_norm.json").read_text())["rows"]
    found = [(row["variant"], row["shape"], row["name"], row["dtype"]) for row in rows]
    assert found == [("no weight", [n], name, "float32") for n in (32, 48) for name in ("ours", "eager")]


def row(name, ms, share=1.0, **changes):
    fixed = {
        "variant": "weight",
        "shape": [64],
        "tokens": 16,
        "dtype": "bfloat16",
        "good": True,
        "errors": [[1.0, 2.0]],
    }
    judged = {"targets": {"way": 0.9}, "parts": {"way": "forward"}, "compared": ["forward"], "of_copy": {"way": share}}
    return {**fixed, **judged, "name": name, "ms": {"forward": ms, "both": ms}, **changes}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("ours", 1.0), row("liger", 1.0), row("torch.compile", 0.995)], []),  # within the noise
        ([row("ours", 1.0), row("eager", 0.5)], []),  # eager is no peer
        ([row("ours", 1.0), row("liger", 0.5), row("torch.compile", 0.8)], ["2.00 of liger", "1.25 of torch.compile"]),
        ([row("ours", 1.0, compared=[]), row("liger", 0.5)], []),
        ([row("ours", 1.0, 0.89)], ["forward: 89.0% of a copy's bandwidth for 90%"]),
        ([row("ours", 1.0, good=False)], ["errors (eager's) 1.0e+00 (2.0e+00)"]),
        ([row("ours", 1.0), {**row("ours, compiled", 1.0), "error": "no memory"}], ["ours, compiled: no memory"]),
        ([row("ours", 1.0), row("ours, compiled", 1.2), row("liger", 1.1)], ["ours, compiled: forward: 1.09 of liger"]),
        ([row("ours", 2.0), row("liger", 1.0, shape=[32])], []),  # another case
    ],
)
def test_verdict(verdict, rows, expected):
    found = verdict.misses(rows)
    assert bool(found) == bool(expected)
    assert all(text in "\n".join(found) for text in expected)


def test_the_worst_of_a_family(verdict):
    rows = [row("ours", 1.0, 0.93), row("liger", 2.0), row("ours", 3.0, 0.8, shape=[32]), row("liger", 2.0, shape=[32])]
    assert verdict.worst(rows) == ("way 80%", "1.50 of liger")
    assert verdict.worst([]) == ("-", "-")


def test_functions_take_turns(measure):
    calls = []

    def one():
        calls.append("one")

    times = measure.Machine("cpu").milliseconds(
        one, calls.append, before=[None, lambda: "made before"], repeat=2, warm=1, calls=2
    )
    turn = ["one", "one", "made before", "made before"]
    assert calls == 3 * turn and len(times) == 2


def test_errors_and_bytes(measure):
    truth = torch.randn(300, 7, dtype=torch.float64)
    near = truth + 1e-3 * truth.norm() / truth.numel() ** 0.5
    ((new, old),) = measure.relative_errors([near], [truth.float()], [truth])
    assert new == pytest.approx(1e-3, rel=1e-6) and old < 1e-7
    assert measure.is_good([[2e-3, 1e-3]], torch.bfloat16) and not measure.is_good([[4e-3, 1e-3]], torch.bfloat16)
    assert not measure.is_good([[math.nan, 1.0]], torch.bfloat16)
    x = torch.zeros(3, 5)
    assert measure.nbytes(x, None, x, torch.zeros(2, dtype=torch.int8)) == 62


@pytest.mark.parametrize(
    ("name", "panels", "value"),
    [
        ("training-h100-2026-11-24", 2, ("eager", 178.0)),
        ("lora-h100-2026-11-25", 2, ("ours", 0.865)),
        ("dequantize_4bit-h100-2026-11-25", 1, None),
        ("linear_cross_entropy-h100-2026-11-25", 1, ("ours", 0.853)),
        ("scaling-cpu", 0, None),
    ],
)
def test_results_have_charts(name, panels, value, tmp_path):
    plot = load(BENCH / "plot.py")
    data = json.loads((BENCH / "results" / f"{name}.json").read_text())
    found = plot.panels(data)
    assert len(found) == panels
    for p in found:
        assert p.groups and all(len(values) == len(p.groups) for values in p.values.values())
    if value:
        assert found[0].values[value[0]][0] == pytest.approx(value[1], rel=1e-2)
    if panels:
        assert "H100" in plot.device(data)


def test_a_chart_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, BENCH / "plot.py", "--out", tmp_path, BENCH / "results" / "lora-h100-2026-11-25.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lora-h100-2026-11-25.png").read_bytes().startswith(b"\x89PNG")
