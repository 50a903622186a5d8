"""What each rewrite takes by itself, and whether a step gets faster when one pattern is switched off.

    python bench/selection.py --executor eager,inductor             each pattern alone, on small modules of real sizes
    python bench/selection.py --steps qwen2-1.5b-lora               steps with select="measure", without each pattern

The first is what the rows of `rewriter/decisions.py` are read from; it runs on a CPU, too (`--tokens 512`). The second
needs a GPU: all modes run in one process, one after the other, "measure" at the beginning and at the end.
JSON goes to `$OUT/selection.json`, or `$OUT/selection-WORK.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))  # an installed rewriter comes first

import works

import rewriter
from rewriter.environment import environment
from rewriter.library import BUILT_IN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUT = Path(os.environ.get("OUT", "."))


class Place(nn.Module):
    """A trained linear layer, so that what follows needs a gradient, and then `function` of its result."""

    def __init__(self, width, function, out=None, **modules):
        super().__init__()
        self.before, self.function = nn.Linear(width, out or width, bias=False), function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x, **given):
        return self.function(self, self.before(x), **given)


def rms(place, x):
    wide = x.float()
    return place.norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotate(x, cos, sin):
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def rotary(place, x):
    b, t, d = x.shape
    heads = x.view(b, t, -1, 128).transpose(1, 2)
    q, k = heads[:, : heads.shape[1] // 2], heads[:, heads.shape[1] // 2 :]
    angles = torch.arange(t, device=x.device)[:, None] * torch.ones(128, device=x.device) / 100
    cos, sin = angles.cos().to(x.dtype)[None, None], angles.sin().to(x.dtype)[None, None]
    return rotate(q, cos, sin) + rotate(k, cos, sin)


def attention(place, x):
    b, t, d = x.shape
    q, k, v = (h.transpose(1, 2) for h in x.view(b, t, 3, -1, 128).unbind(2))
    scores = 50 * torch.tanh(q @ k.transpose(-1, -2) * 128**-0.5 / 50)
    scores = scores + place.causal.mask
    return scores.softmax(-1, dtype=torch.float32).to(x.dtype) @ v


def four_bits(place, x):
    return place.layer(x)


def adapted(place, x):
    return place.layer(x) + place.up(place.down(x)) * 2.0


def packed(width, out, dtype):
    import bitsandbytes

    return bitsandbytes.nn.Linear4bit(width, out, bias=False, compute_dtype=dtype, quant_type="nf4")


def frozen(module):
    return module.requires_grad_(False)


def causal(length):
    module = nn.Module()
    module.register_buffer("mask", torch.full((length, length), -1e30).triu(1))
    return module


def places(width, inner, vocabulary, length, dtype):
    """Name -> (module, whether it takes labels)."""

    def alone(*modules_and_widths, **modules):
        return Place(*modules_and_widths, **modules)

    def head(place, x, labels):
        return F.cross_entropy(place.head(x).flatten(0, 1).float(), labels.flatten())

    def loss(place, x, labels):
        return F.cross_entropy(x.flatten(0, 1).float(), labels.flatten())

    def narrow():
        return nn.Linear(width, 16, bias=False), nn.Linear(16, inner, bias=False)

    table = {
        "rms_norm": lambda: alone(width, rms, norm=nn.RMSNorm(width)),
        "rms_norm of the library": lambda: alone(width, lambda p, x: p.norm(x), norm=nn.RMSNorm(width, eps=1e-6)),
        "layer_norm of the library": lambda: alone(width, lambda p, x: p.norm(x), norm=nn.LayerNorm(width)),
        "add_rms_norm": lambda: alone(width, lambda p, x: (s := x + x.sin(), rms(p, s)), norm=nn.RMSNorm(width)),
        "glu": lambda: alone(width, lambda p, x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], 2 * inner),
        "rotary": lambda: alone(width, rotary, 2 * width),
        "attention": lambda: alone(width, attention, 3 * width, causal=causal(length)),
        "cross_entropy": lambda: alone(width, loss, vocabulary),
        "linear_cross_entropy": lambda: alone(width, head, head=nn.Linear(width, vocabulary, bias=False)),
        "linear_cross_entropy, frozen": lambda: alone(
            width, head, head=frozen(nn.Linear(width, vocabulary, bias=False))
        ),
        "lora": lambda: alone(
            width, adapted, layer=frozen(nn.Linear(width, inner, bias=False)), down=narrow()[0], up=narrow()[1]
        ),
        "linear_4bit": lambda: alone(width, four_bits, layer=packed(width, inner, dtype)),
        "lora of 4 bits": lambda: alone(
            width, adapted, layer=packed(width, inner, dtype), down=narrow()[0], up=narrow()[1]
        ),
    }
    return {name: (make, "entropy" in name) for name, make in table.items()}


def measure_places(given) -> list[dict]:
    dtype = getattr(torch, given.dtype)
    rows = []
    for name, (make, labelled) in places(
        given.width, given.inner, given.vocabulary, given.tokens // given.batch, dtype
    ).items():
        for executor in given.executor.split(","):
            row = {"place": name, "executor": executor}
            try:
                torch._dynamo.reset()
                torch.manual_seed(0)
                model = make().to(dtype).to(DEVICE)
                x = torch.randn(given.batch, given.tokens // given.batch, given.width, device=DEVICE, dtype=dtype)
                extra = {"labels": torch.randint(given.vocabulary, x.shape[:2], device=DEVICE)} if labelled else {}
                start = time.perf_counter()
                report = rewriter.explain(model, select="measure", executor=executor)(x, **extra)
                row["seconds"] = time.perf_counter() - start
                row["kept"] = [k.call for k in report.kept]
                row["sites"] = [
                    {"pattern": e.pattern, "applied": hasattr(e, "replacement"), "why": getattr(e, "reason", ""),
                     **(e.measured.__dict__ if e.measured else {})}
                    for e in (*report.rewrites, *report.near_misses)
                ]  # fmt: skip
            except Exception as error:
                traceback.print_exc()
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
            print(line_of(row), flush=True)
            model = x = None
            gc.collect()
    return rows


def line_of(row) -> str:
    text = [f"{row['place']:30s} {row['executor']:9s}"]
    for site in row.get("sites", ()):
        if site.get("new_ms") is None:
            text.append(f"{site['pattern']}: {site.get('note') or site['why']}")
            continue
        host = f", host {site['new_host_ms']:.3f} ({site['old_host_ms']:.3f})" if site["new_host_ms"] else ""
        text.append(
            f"{site['pattern']} {'made' if site['applied'] else 'LEFT'} {site['new_ms']:.3f} ms ({site['old_ms']:.3f})"
            f", {site['new_mib']:.0f} MiB ({site['old_mib']:.0f}){host}"
        )
    return "  ".join([*text, *row.get("kept", ()), row.get("failed", "")])


def measure_steps(given) -> list[dict]:
    """Medians of steps: everything, measured, and measured without each pattern that was used."""
    runs = {"shipped": {"select": "shipped"}, "all": {"select": "all"}, "measure": {"select": "measure"}}
    rows, done = [], []
    batch = works.batch(given.steps, DEVICE, 0)
    used: list[str] | None = None
    while runs:
        name, options = next(iter(runs.items()))
        del runs[name]
        row = {"work": given.steps, "mode": name}
        try:
            torch._dynamo.reset()
            gc.collect()
            model = rewriter.optimize(works.build(given.steps, DEVICE, 0, False), **options)

            def step(model=model):
                model.zero_grad(set_to_none=True)
                model(**batch).loss.backward()

            start = time.perf_counter()
            step()
            synchronize()
            row["first_step_s"] = time.perf_counter() - start
            for _ in range(3):
                step()
            times = []
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(given.repeat):
                synchronize()
                start = time.perf_counter()
                step()
                synchronize()
                times.append(1e3 * (time.perf_counter() - start))
            row |= {"ms": statistics.median(times), "all_ms": times}
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
            report = rewriter.report(model)
            row["coverage"] = {n: list(c) for n, c in report.coverage().items()}
            row["left"] = sorted({f"{m.pattern}: {m.reason}" for m in report.near_misses if m.choice})
            if name == "measure":
                used = sorted({r.pattern for r in report.rewrites} & set(BUILT_IN))
                runs |= {f"without {p}": {"select": "measure", "exclude": [p]} for p in used}
                runs["measure again"] = {"select": "measure"}
        except Exception as error:
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        model = step = None
        rows.append(row)
        done.append(f"{name:32s} {row.get('ms', float('nan')):8.1f} ms  first {row.get('first_step_s', 0):6.1f} s  "
                    f"{row.get('peak_gib') or 0:5.1f} GiB  {row.get('failed', '')}")  # fmt: skip
        print(done[-1], *row.get("left", ()), sep="\n    ", flush=True)
    print("\n".join(done))
    return rows


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", default="eager,inductor")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", metavar="WORK", help="a work of works.py")
    parser.add_argument("--repeat", type=int, default=10, help="steps that are timed, with --steps")
    parser.add_argument("--keep-cache", action="store_true", help="of measurements; by default it begins empty")
    given = parser.parse_args()
    result = {"environment": environment(), "options": vars(given), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        if not given.keep_cache:
            os.environ["REWRITER_CACHE_DIR"] = folder
        result["rows"] = measure_steps(given) if given.steps else measure_places(given)
    OUT.mkdir(parents=True, exist_ok=True)
    name = f"selection-{given.steps}.json" if given.steps else "selection.json"
    (OUT / name).write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
