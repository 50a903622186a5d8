"""What lowering, matching and rewriting cost, without verification, against the number of nodes in a graph.

    python bench/scaling.py --nodes 1000,3000,10000,30000

A hand-written Transformer block is captured once; copies of it, each with its own parameters, are chained into one
graph with a final norm and a head with its loss behind. Reported is the time per node of the lowered graph. It has to
stay below LIMIT_MS, and must not grow with the graph by more than GROWTH.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch
from torch import fx, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # an installed rewriter comes first

from rewriter.environment import environment  # noqa: E402
from rewriter.library import built_in  # noqa: E402
from rewriter.lower import Lowering  # noqa: E402
from rewriter.rewrite import Fuel, Proofs, rewrite  # noqa: E402

LIMIT_MS = 1.0  # matching and rewriting, for one node
GROWTH = 1.5  # milliseconds a node in the largest graph, relative to the smallest
WIDTH, HEADS, KV_HEADS, CLASSES, BATCH, LENGTH = 64, 4, 2, 128, 2, 16
SHARED = ("x", "cos", "sin", "labels")  # inputs that are no parameters


class Norm(nn.Module):
    """RMSNorm as most models spell it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Block(nn.Module):
    """Attention with grouped heads and rotary embedding, and a gated MLP."""

    def __init__(self):
        super().__init__()
        head = WIDTH // HEADS
        self.head, self.norm1, self.norm2 = head, Norm(), Norm()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, KV_HEADS * head), nn.Linear(WIDTH, KV_HEADS * head)
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x, cos, sin):
        h = self.norm1(x)
        q, k, v = (m(h).view(*h.shape[:2], -1, self.head).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(*h.shape))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = Norm(), nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x, labels):
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def capture(module: nn.Module, *inputs: torch.Tensor) -> fx.Graph:
    """The graph that Dynamo hands to a backend."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm.graph)
        return gm.forward

    torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    return graphs[0]


def capture_parts() -> tuple[fx.Graph, fx.Graph]:
    torch.manual_seed(0)
    head = WIDTH // HEADS
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    cos, sin = (torch.randn(BATCH, 1, LENGTH, head, dtype=torch.bfloat16) for _ in range(2))
    labels = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    return capture(Block().bfloat16(), x, cos, sin), capture(Tail().bfloat16(), x, labels)


def chain(parts: list[fx.Graph]) -> fx.GraphModule:
    """One graph of all parts, each part's result being the next one's `x`; parameters are separate inputs."""
    graph, shared = fx.Graph(), {}
    new: list[dict[fx.Node, fx.Node]] = [{} for _ in parts]
    for part, mine in zip(parts, new, strict=True):
        for node in part.find_nodes(op="placeholder"):
            name = node.name.removeprefix("l_").removesuffix("_")
            if name not in SHARED:
                mine[node] = copy(graph, node, mine)
            elif name in shared:
                mine[node] = shared[name]
            else:
                mine[node] = shared[name] = copy(graph, node, mine)
    result = shared["x"]
    for part, mine in zip(parts, new, strict=True):
        mine.update({n: result for n in part.find_nodes(op="placeholder") if n.name == "l_x_"})
        for node in part.nodes:
            if node.op == "output":
                result = mine[node.args[0][0]]
            elif node.op != "placeholder":
                mine[node] = copy(graph, node, mine)
    graph.output((result,))
    return fx.GraphModule(nn.Module(), graph)


def copy(graph: fx.Graph, node: fx.Node, new: dict[fx.Node, fx.Node]) -> fx.Node:
    result = graph.node_copy(node, new.__getitem__)
    result.meta = dict(node.meta)
    if node.op == "placeholder":
        result.target = result.name  # the parameter's name in the function, so each needs its own
    return result


def seconds(action, *args):
    gc.collect()
    start = time.process_time()
    result = action(*args)
    return time.process_time() - start, result


def measure(gm: fx.GraphModule, repeats: int) -> dict:
    """The best of `repeats` for one graph; lowering both with an empty and a filled cache of traces."""
    patterns, times = tuple(built_in().values()), []
    for _ in range(repeats):
        lowering = Lowering()
        cold, lowered = seconds(lowering, gm)
        nodes = len(lowered.graph.nodes)
        warm, lowered = seconds(lowering, gm)
        spent, result = seconds(rewrite, lowered, patterns, Proofs(False), Fuel())
        times.append({"lower_cold": cold, "lower": warm, "rewrite": spent})
    best = {name: min(t[name] for t in times) for name in times[0]}
    per_node = {f"{name}_ms_per_node": 1e3 * value / nodes for name, value in best.items()}
    return {"nodes": nodes, "rewrites": len(result.applied), **{f"{k}_s": v for k, v in best.items()}, **per_node}


def judge(rows: list[dict]) -> list[str]:
    """What is wrong with these measurements, smallest graph first."""
    wrong = []
    for row in rows:
        if row["rewrite_ms_per_node"] >= LIMIT_MS:
            wrong.append(f"rewriting {row['nodes']} nodes took {row['rewrite_ms_per_node']:.2f} ms a node")
    for what in ("lower", "rewrite"):
        growth = rows[-1][f"{what}_ms_per_node"] / rows[0][f"{what}_ms_per_node"]
        if growth > GROWTH:
            wrong.append(f"{what}: {growth:.2f} times as long for a node of the largest graph as of the smallest")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", default="1000,3000,10000,30000", help="sizes of the lowered graphs, about")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "scaling-cpu.json")
    args = parser.parse_args()

    block, tail = capture_parts()
    lowered = Lowering()
    one, two = (len(lowered(chain([block] * n + [tail])).graph.nodes) for n in (1, 2))
    measure(chain([block, tail]), 1)  # traces the patterns' references, which happens once in a process
    rows = []
    print(f"{'nodes':>7} {'rewrites':>9} {'lower, first':>14} {'lower':>9} {'rewrite':>9}   ms a node")
    for size in sorted(map(int, args.nodes.split(","))):
        gm = chain([block] * max(1, 1 + round((size - one) / (two - one))) + [tail])
        row = measure(gm, args.repeats)
        rows.append(row)
        figures = (row[f"{what}_ms_per_node"] for what in ("lower_cold", "lower", "rewrite"))
        print(f"{row['nodes']:>7} {row['rewrites']:>9} {'{:>14.3f} {:>9.3f} {:>9.3f}'.format(*figures)}", flush=True)
    wrong = judge(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"environment": environment(), "limit_ms": LIMIT_MS, "growth": GROWTH, "rows": rows, "wrong": wrong}
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("\n".join(wrong) or "linear, and within the limit")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
