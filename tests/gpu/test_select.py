"""select="measure" on a GPU: every place is timed, by device and host, and leaves nothing behind."""

import pytest
import torch
from torch import nn

import rewriter
from rewriter.pattern import Call, Pattern, Reference


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up = nn.RMSNorm(1024, eps=1e-6), nn.Linear(1024, 4096), nn.Linear(1024, 4096)

    def forward(self, x):
        x = self.norm(x)
        return (nn.functional.silu(self.gate(x)) * self.up(x)).square().mean()


def gated(x):
    return x * torch.sigmoid(1.5 * x)


def slow(x):
    useless = x.detach().reshape(-1)[:1].expand(4096, 4096) * 0.5
    for _ in range(4):
        useless = useless @ useless / 4096
    return gated(x) + useless[0, 0] * 1e-30


class Slow(Pattern):
    name = "slow"
    references = (Reference(gated, {"x": (4, 8)}),)

    def replacement(self, match):
        return Call(slow, (match["x"],))


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("REWRITER_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()


@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_every_place_is_timed(executor):
    model = Model().cuda().bfloat16()
    x = torch.randn(4, 512, 1024, device="cuda", dtype=torch.bfloat16)
    state, before = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    report = rewriter.explain(model, select="measure", executor=executor)(x)
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert torch.cuda.memory_allocated() - before < 128 << 20  # workspaces of cuBLAS at most
    every = [*report.rewrites, *report.near_misses]
    assert {e.pattern for e in every} >= {"rms_norm", "glu"}
    for entry in every:
        assert entry.measured.note == "" and min(entry.measured.new_ms, entry.measured.old_ms) > 0
        assert min(entry.measured.new_host_ms, entry.measured.old_host_ms) > 0


@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_a_slow_one_is_refused(executor):
    model = nn.Sequential(nn.Linear(64, 64), Gated(), nn.Linear(64, 64)).cuda()
    options = {"patterns": ["rms_norm", Slow()], "select": "measure", "executor": executor}
    report = rewriter.explain(model, **options)(torch.randn(8, 64, device="cuda"))
    (miss,) = report.near_misses
    assert miss.choice and miss.measured.new_ms > 2 * miss.measured.old_ms, miss.measured


class Gated(nn.Module):
    def forward(self, x):
        return gated(x)
