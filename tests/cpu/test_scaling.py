"""The cost of lowering, matching and rewriting stays proportional to the graph."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GROWTH = 2.0  # the bench asks for 1.5; a test machine is noisy


def test_cost_a_node_does_not_grow(tmp_path):
    out = tmp_path / "scaling.json"
    command = [sys.executable, ROOT / "bench" / "scaling.py", "--nodes", "1000,4000", "--repeats", "2", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert out.exists(), done.stderr
    small, large = json.loads(out.read_text())["rows"]
    assert large["nodes"] > 3.5 * small["nodes"]
    assert large["rewrites"] > 3.5 * small["rewrites"] > 100  # the graphs are full of work, not passed over
    for row in (small, large):
        assert row["rewrite_ms_per_node"] < 1.0
    for what in ("lower", "rewrite"):
        assert large[f"{what}_ms_per_node"] < GROWTH * small[f"{what}_ms_per_node"]
