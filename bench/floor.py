"""The least time that a training step's matrix products and attention need, at ceilings measured on this device.

    python bench/floor.py '{"works": ["llama-8b-lora"], "checkpointing": false, "device": "cuda"}' floors.json

`training.py` starts it in a process of its own. bench/README.md says what is counted and what is not.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import works

REPEATS, CALLS = 5, 8
CHUNKS = (1024, 2048)  # rows of the head's products that are tried beside all of them
COPIED = 2**30  # bytes
HEAD_START = 6_000_000  # clock cycles, about 3 ms: the host has launched all calls before the first one runs
ADAM_PASSES = 7  # weight, gradient and two moments are read; weight and two moments are written


@dataclass(frozen=True)
class Product:
    """Linear layers that share an input, in one direction: [rows, width] and [width, outs], `times` in a step.

    `extra` are the FLOPs of their adapters, all times together.
    """

    name: str
    direction: str  # "forward", "dx", "dw"
    rows: int
    width: int
    outs: tuple[int, ...]
    times: int
    extra: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.width * sum(self.outs) * self.times

    def parts(self) -> list[tuple[int, int, int]]:
        """(m, k, n) of each layer's product, apart: [m, k] @ [k, n]."""
        return [self._size(out) for out in self.outs]

    def joint(self) -> tuple[int, int, int]:
        """(m, k, n) where the layers' weights lie in one matrix."""
        return self._size(sum(self.outs))

    def _size(self, out: int) -> tuple[int, int, int]:
        if self.direction == "forward":
            return self.rows, self.width, out
        return (self.rows, out, self.width) if self.direction == "dx" else (out, self.rows, self.width)


@dataclass(frozen=True)
class Attention:
    """Causal attention of one block, in heads of `dim`; `forward` and `backward` times in a step."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    dim: int
    forward: int
    backward: int

    @property
    def flops(self) -> int:
        """Half of the square is masked; the backward has five products for the forward's two."""
        one = 2 * self.batch * self.heads * self.length**2 * self.dim
        return one * self.forward + one * 5 * self.backward // 2


def products(work: str, checkpointing: bool) -> list[Product]:
    """Every product that a step of the work needs.

    Frozen weights have no dW, and the first block's q, k and v, whose input nobody asks a gradient for, no dX. With
    checkpointing the blocks' forward runs again, but for the last layer: nobody needs its output.
    """
    shape, method = works.parse(work)
    sizes, rows = shape.sizes, shape.batch * shape.length
    hidden, blocks, dim = sizes["hidden_size"], sizes["num_hidden_layers"], head_dim(sizes)
    query, key = sizes["num_attention_heads"] * dim, sizes["num_key_value_heads"] * dim
    inner, trained = sizes["intermediate_size"], method == "full"
    layers = {
        "q k v": (hidden, (query, key, key)),
        "o": (query, (hidden,)),
        "gate up": (hidden, (inner, inner)),
        "down": (inner, (hidden,)),
    }
    found = []
    for name, (width, outs) in layers.items():
        first = int(name == "q k v" and not trained)
        forward = blocks * (2 if checkpointing and name != "down" else 1)
        # A low-rank product with A is as wide as the input, one with B as the output. Backward has two of each: dY B,
        # dY^T u for B, (dY B)^T x for A and, where the input wants a gradient, (dY B) A.
        once = 0 if trained else 2 * rows * works.RANK
        both, inputs = once * sum(width + out for out in outs), once * width * len(outs)
        found.append(Product(name, "forward", rows, width, outs, forward, both * forward))
        found.append(Product(name, "dx", rows, width, outs, blocks - first, 2 * both * blocks - first * inputs))
        if trained:
            found.append(Product(name, "dw", rows, width, outs, blocks))
    for direction in ("forward", "dx", "dw")[: 3 if trained else 2]:
        found.append(Product("head", direction, rows, hidden, (sizes["vocab_size"],), 1))
    return found


def attention(work: str, checkpointing: bool) -> Attention:
    shape, _ = works.parse(work)
    sizes = shape.sizes
    blocks = sizes["num_hidden_layers"]
    heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    forward = blocks * (2 if checkpointing else 1)
    return Attention(shape.batch, *heads, shape.length, head_dim(sizes), forward, blocks)


def head_dim(sizes: dict) -> int:
    return sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]


def optimizer_bytes(work: str) -> int:
    """What AdamW reads and writes for the weights of the model where all of them train, else 0 (adapters are small)."""
    shape, method = works.parse(work)
    if method != "full":
        return 0
    return ADAM_PASSES * parameters(shape.sizes, shape.config) * shape.dtype.itemsize


def parameters(sizes: dict, config: str) -> int:
    hidden, dim, inner = sizes["hidden_size"], head_dim(sizes), sizes["intermediate_size"]
    query, key = sizes["num_attention_heads"] * dim, sizes["num_key_value_heads"] * dim
    block = hidden * (2 * query + 2 * key) + 3 * hidden * inner + 2 * hidden
    if config == "Qwen2Config":
        block += query + 2 * key  # the biases of q, k and v
    tables = sizes["vocab_size"] * hidden * (1 if sizes["tie_word_embeddings"] else 2)
    return block * sizes["num_hidden_layers"] + hidden + tables


# ---- ceilings ------------------------------------------------------------------------------------------------------


class Ceilings:
    """Times in milliseconds of single operations on one device; each is measured once."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype, self.known = device, dtype, {}

    def product(self, product: Product) -> tuple[float, str]:
        """The best time of one of `product.times`, and the way that had it."""
        ways = {"apart": sum(self.matmul(product.direction, *size) for size in product.parts())}
        if len(product.outs) > 1:
            ways["together"] = self.matmul(product.direction, *product.joint())
        if product.name == "head" and product.direction != "dw":
            for rows in CHUNKS:
                if product.rows > rows and product.rows % rows == 0:
                    _, k, n = product.joint()
                    ways[f"{rows} rows"] = self.matmul(product.direction, rows, k, n) * (product.rows // rows)
        way = min(ways, key=ways.__getitem__)
        return ways[way], way

    def matmul(self, direction: str, m: int, k: int, n: int) -> float:
        """[m, k] @ [k, n] with the layouts that the direction has: x W^T, dY W or dY^T x."""

        def measure() -> float:
            left = self._random(k, m).t() if direction == "dw" else self._random(m, k)
            right = self._random(n, k).t() if direction == "forward" else self._random(k, n)
            out = torch.empty(m, n, device=self.device, dtype=self.dtype)
            return self._time(lambda: torch.mm(left, right, out=out))

        return self._once((direction, m, k, n), measure)

    def sdpa(self, shape: Attention) -> dict[str, tuple[float, str]]:
        """Best forward and best backward of `scaled_dot_product_attention`, and the backends that had them."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION") if self.device == "cuda" else ("MATH",)
        best: dict[str, tuple[float, str]] = {}
        batch, length, dim = shape.batch, shape.length, shape.dim
        for name in names:
            try:
                # As a model's projections leave them: [batch, length, heads, dim], seen transposed.
                query, key, value = (
                    self._random(batch, length, heads, dim).transpose(1, 2).requires_grad_()
                    for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
                )
                grouped = {"enable_gqa": True} if shape.heads != shape.kv_heads else {}

                def call(q=query, k=key, v=value, grouped=grouped) -> torch.Tensor:
                    return scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)

                with sdpa_kernel(getattr(SDPBackend, name)):
                    out = call()
                    upstream = self._random(batch, length, shape.heads, dim).transpose(1, 2)
                    inputs = (query, key, value)
                    times = {
                        "forward": self._time(call),
                        "backward": self._time(
                            lambda out=out, inputs=inputs, upstream=upstream: torch.autograd.grad(
                                out, inputs, upstream, retain_graph=True
                            )
                        ),
                    }
            except RuntimeError as error:  # a backend that doesn't take the shape
                print(f"{name}: {str(error).splitlines()[0]}", flush=True)
                continue
            for direction, spent in times.items():
                best[direction] = min(best.get(direction, (spent, name)), (spent, name))
        if not best:
            raise RuntimeError(f"no backend takes {shape}")
        return best

    def copied_bytes_per_ms(self) -> float:
        """Read and written together."""

        def measure() -> float:
            size = COPIED if self.device == "cuda" else 2**24
            source = torch.empty(size, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            return 2 * size / self._time(lambda: target.copy_(source))

        return self._once("copy", measure)

    def _once(self, key, measure: Callable[[], float]) -> float:
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype)

    def _time(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call: the best mean of REPEATS x CALLS."""
        for _ in range(2):
            call()
        spent = []
        for _ in range(REPEATS):
            if self.device == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(HEAD_START)
                start.record()
                for _ in range(CALLS):
                    call()
                end.record()
                torch.cuda.synchronize()
                spent.append(start.elapsed_time(end) / CALLS)
            else:
                began = time.perf_counter()
                call()
                spent.append(1e3 * (time.perf_counter() - began))
        return min(spent)


def floor(work: str, checkpointing: bool, ceilings: Ceilings) -> dict:
    """The floor of one work: `floor_ms` and what it is made of."""
    rows = []
    for product in products(work, checkpointing):
        one, way = ceilings.product(product)
        # Adapters at the rate of the layers that they belong to, which none of them reaches by itself.
        spent = one * product.times * (1 + product.extra / product.flops)
        rate = product.flops / (one * product.times) / 1e9
        rows.append({**asdict(product), "flops": product.flops, "ms": spent, "tflops_per_s": rate, "way": way})
    shape = attention(work, checkpointing)
    best = ceilings.sdpa(shape)
    attending = best["forward"][0] * shape.forward + best["backward"][0] * shape.backward
    matmuls = sum(row["ms"] for row in rows)
    bandwidth = ceilings.copied_bytes_per_ms()
    optimizing = optimizer_bytes(work) / bandwidth
    return {
        "floor_ms": matmuls + attending + optimizing,
        "matmul_ms": matmuls,
        "attention_ms": attending,
        "optimizer_ms": optimizing,
        "matmul_flops": sum(row["flops"] + row["extra"] for row in rows),
        "attention_flops": shape.flops,
        "copy_tb_per_s": bandwidth / 1e9,
        "attention": {**asdict(shape), **{f"one_{k}_ms": v[0] for k, v in best.items()}, "backends": best},
        "products": rows,
    }


def main() -> None:
    task, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    found, ceilings = [], {}
    for work in task["works"]:
        entry = {"work": work, "checkpointing": task["checkpointing"], "device": task["device"]}
        try:
            dtype = works.parse(work)[0].dtype
            measured = ceilings.setdefault(dtype, Ceilings(task["device"], dtype))
            entry.update(floor(work, task["checkpointing"], measured))
        except Exception as error:  # the steps are worth having without it
            traceback.print_exc()
            entry.update(floor_ms=None, why=f"{type(error).__name__}: {str(error).strip()[:300]}")
        found.append(entry)
        out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
