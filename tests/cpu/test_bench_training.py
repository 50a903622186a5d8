"""The training benchmark runs, and voids what did not train."""

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
SHORT = ["--device", "cpu", "--steps", "2", "--warmup", "1"]


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))  # for what it imports itself
    spec = importlib.util.spec_from_file_location("bench_training", BENCH / "training.py")  # tests/training is another
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("works", "kernel_profile", "floor"):
        sys.modules.pop(name, None)


def task(**changes):
    fixed = {"checkpointing": False, "device": "cpu", "seed": 0, "warmup": 1, "steps": 2, "profile": False}
    return {"work": "tiny-full", "mode": "eager", **fixed, **changes}


def result(mode, **changes):
    measured = {"loss": 6.0, "grad_norm": 1.0, "parameters_with_gradient": 21, "median_ms": 10.0}
    return {**task(mode=mode), "status": "ok", "why": "", **measured, **changes}


def test_it_measures_eager_and_ours(tmp_path):
    out = tmp_path / "training.json"
    command = [
        sys.executable,
        BENCH / "training.py",
        "--work",
        "tiny-lora",
        "--modes",
        "eager,rewriter-eager",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *SHORT, "--out", out], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {(r["work"], r["mode"]): r for r in json.loads(out.read_text())["runs"]}
    assert len(runs) == 2
    eager, ours = runs["tiny-lora", "eager"], runs["tiny-lora", "rewriter-eager"]
    assert eager["status"] == ours["status"] == "ok"
    assert eager["losses"] == pytest.approx(ours["losses"], rel=1e-4)
    assert eager["losses"][0] > eager["losses"][-1]
    assert eager["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)
    assert eager["trained_parameters"] == ours["trained_parameters"] > 0
    assert ours["report"]["coverage"]["rms_norm"][0] == 5  # two blocks and the last norm
    assert ours["environment"]["torch"]
    assert "tiny-lora  " in done.stdout and len(ours["step_ms"]) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": math.nan}, "nan"),
        ({"grad_norm": math.inf}, "inf"),
        ({"grad_norm": 0.0}, "zero"),
        ({"loss": 6.2}, "eager's is 6.0000"),
        ({"parameters_with_gradient": 20}, "20 parameters"),
        ({"checkpointing": True}, "no eager run"),
    ],
)
def test_a_run_that_did_not_train_is_void(training, changes, reason):
    runs = [result("eager"), result("rewriter-eager", **changes)]
    training.judge(runs)
    assert [r["status"] for r in runs] == ["ok", "void"]
    assert reason in runs[1]["why"]
    assert "void" in training.table(runs).splitlines()[2]


def test_judging_again_changes_nothing(training):
    runs = [result("eager"), result("liger", loss=6.1, median_ms=5.0), result("rewriter-eager", loss=7.0)]
    training.judge(runs)
    once = copy.deepcopy(runs)
    training.judge(runs)
    assert runs == once
    assert [r["status"] for r in runs] == ["ok", "ok", "void"]
    assert runs[1]["speedup"] == 2.0


def test_a_configuration_that_takes_too_long_is_killed(training):
    killed = training.run(task(), limit=0.2, keep_caches=False)
    assert (killed["status"], killed["why"]) == ("failed", "not done after 0.2 s")
    assert "failed" in training.table([killed])


def test_a_profile_counts_overlap_once(training):
    profile = importlib.import_module("kernel_profile")
    events = [
        {"name": "nvjet_sm90_tst_256x128", "ts": 0.0, "dur": 4000.0},
        {"name": "Memcpy DtoD (Device -> Device)", "ts": 2000.0, "dur": 4000.0},
        {"name": "nvjet_sm90_tst_256x128", "ts": 10000.0, "dur": 2000.0},
        {"name": "_rotary_kernel", "ts": 12000.0, "dur": 1000.0},
    ]
    got = profile.summary(events, 2, profile.our_kernels())
    assert got["gpu_busy_ms"] == 4.5  # 6 ms and 3 ms, in two steps
    assert got["kernels"] == 2.0
    assert got["top"][0] == {"name": "nvjet_sm90_tst_256x128", "kind": "matmul", "ms": 3.0, "calls": 1.0}
    kinds = {kind: ms for kind, ms in got["ms_by_kind"].items() if ms}
    assert kinds == {"matmul": 3.0, "copy": 2.0, "ours": 0.5}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("triton_poi_fused_add_mul_silu_1", "triton"),
        ("liger_cross_entropy_kernel", "triton"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<x>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::F>", "elementwise"),
    ],
)
def test_kernels_are_told_by_their_names(training, name, kind):
    assert importlib.import_module("kernel_profile").kind(name) == kind


@pytest.fixture
def floor(training):
    return importlib.import_module("floor")


def test_the_floor_counts_what_a_step_needs(floor):
    """Products of the smallest work by hand: width 64, 4 heads (2 for keys), 128 inside, 512 classes, 2 blocks."""
    weights = 64 * (64 + 32 + 32) + 64 * 64 + 64 * 256 + 128 * 64
    block, head = 2 * 64 * weights, 2 * 64 * 64 * 512
    once = {p.name: p.flops for p in floor.products("tiny-full", False) if p.direction == "forward"}
    assert sum(once.values()) == 2 * block + head and once["head"] == head
    assert sum(p.flops for p in floor.products("tiny-full", False)) == 3 * (2 * block + head)
    frozen = sum(p.flops for p in floor.products("tiny-lora", False))
    assert frozen == 2 * (2 * block + head) - 2 * 64 * 64 * 128  # nobody asks for the first block's dX of q, k and v
    again = sum(p.flops for p in floor.products("tiny-lora", True)) - frozen
    assert again == 2 * block - 2 * 2 * 64 * 128 * 64  # the blocks' forward once more, without their last layer
    attention = floor.attention("tiny-full", False)
    assert attention.flops == 2 * 2 * 4 * 32 * 32 * 16 * (1 + 2.5) * 2


def test_the_floor_is_measured(training, tmp_path):
    out = tmp_path / "floors.json"
    task = {"works": ["tiny-lora", "tiny-full"], "checkpointing": False, "device": "cpu"}
    why = training.alone("floor.py", task, out, tmp_path / "log", 120, dict(os.environ))
    assert why == "ended with code 0"
    for found in json.loads(out.read_text()):
        parts = found["matmul_ms"], found["attention_ms"], found["optimizer_ms"]
        assert found["floor_ms"] == pytest.approx(sum(parts)) and min(parts[:2]) > 0
        assert (found["optimizer_ms"] > 0) == (found["work"] == "tiny-full")


@pytest.mark.parametrize("bad", [["--work", "gpt-17-full"], ["--modes", "magic"], ["--append"]])
def test_wrong_arguments_are_refused(bad):
    done = subprocess.run([sys.executable, BENCH / "training.py", *bad], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error:" in done.stderr and "Traceback" not in done.stderr
