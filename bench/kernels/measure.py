"""What the kernel benchmarks share: times, ceilings, memory, errors against float64, and results as JSON.

Importing it makes the source tree's `rewriter` importable.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
OUT = Path(os.environ.get("OUT", "."))

# What a relative error may be beyond twice eager's: roundings in another order.
FLOOR = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 1e-3}


class Machine:
    """Where things are measured: a GPU, or for a smoke run a CPU, whose times mean nothing and whose peaks are None."""

    def __init__(self, device="cuda"):
        self.device, self.gpu = device, device != "cpu"
        self._cache = torch.empty(256 << 20 if self.gpu else 0, dtype=torch.uint8, device=device)

    def milliseconds(self, *functions, before=None, repeat=20, calls=1, warm=3, cold=True, ahead=3_000_000):
        """Median time of a call of each of the functions, which take turns, so that all of them see the same clocks.

        before: for each function None, or another that is called untimed ahead of it and whose result it is given.
        calls: how many calls in a row make a turn. warm: turns that are not timed. cold: what is in the GPU's L2 cache
        is overwritten before each turn. ahead: cycles for which the GPU waits before a turn, while the host launches
        what follows: times are the GPU's. 0: it does not wait.
        """
        before = before or [None] * len(functions)
        times = [[] for _ in functions]
        for count in range(warm + repeat):
            for function, prepare, column in zip(functions, before, times, strict=True):
                turn = self._turn(function, prepare, calls, cold, ahead)
                if count >= warm:
                    column.append(turn)
        self.synchronise()
        return [statistics.median(self._elapsed(*turn) / calls for turn in column) for column in times]

    def _turn(self, function, prepare, calls, cold, ahead):
        if self.gpu and ahead:
            torch.cuda._sleep(ahead)
        given = [() if prepare is None else (prepare(),) for _ in range(calls)]
        if cold:
            self._cache.zero_()
        start = self._now()
        for arguments in given:
            function(*arguments)
        return start, self._now()

    def _now(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed(self, start, end):
        return start.elapsed_time(end) if self.gpu else (end - start) * 1e3

    def synchronise(self):
        if self.gpu:
            torch.cuda.synchronize()

    def empty_cache(self):
        if self.gpu:
            torch.cuda.empty_cache()

    def copy(self, count):
        """A function that moves `count` bytes, half of them read and half written: the ceiling of memory-bound ones."""
        source = torch.empty(max(count // 2, 1), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def matmul_tflops(self, size=8192, dtype=torch.bfloat16):
        """TFLOP/s of the library's square product: the ceiling of what computes."""
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2 * size**3 / self.milliseconds(lambda: a @ b, cold=False)[0] / 1e9

    def peak_mib(self, function, needed=0):
        """Most memory allocated during a call beyond what is there before and `needed` bytes, those of its results."""
        if not self.gpu:
            function()
            return None
        self.synchronise()
        self.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        self.synchronise()
        return (torch.cuda.max_memory_allocated() - before - needed) / 2**20

    def generator(self, seed=0):
        return torch.Generator(self.device).manual_seed(seed)

    def environment(self, *packages):
        """{"device": its name, "versions": those of torch, triton and of the packages that are installed}."""
        versions = {}
        for name in ("torch", "triton", *packages):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {"device": torch.cuda.get_device_name() if self.gpu else platform.machine(), "versions": versions}


def nbytes(*tensors):
    """Bytes of the tensors that are not None, one that comes twice counted once."""
    sizes = {(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors if t is not None}
    return sum(sizes.values())


def distance(found, truth):
    """|found - truth| / |truth| in the 2-norm, in pieces, as a whole float64 copy of logits may not fit."""
    found, truth = (t.detach().reshape(t.shape or (1,)) for t in (found, truth))
    size = max(1, (1 << 26) // max(truth[0].numel(), 1))
    pieces = zip(found.split(size), truth.split(size), strict=True)
    square = sum((f.double() - t).square().sum() for f, t in pieces)
    return (square.sqrt() / truth.norm()).item()


def relative_errors(new, old, truth):
    """[this, eager's] for each tensor of `new`, against float64."""
    return [[distance(a, t), distance(b, t)] for a, b, t in zip(new, old, truth, strict=True)]


def is_good(errors, dtype):
    """Whether no error is more than twice eager's and the floor of the dtype; NaN never is."""
    return all(new <= 2 * old + FLOOR[dtype] for new, old in errors)


def save(results, name):
    """Write $OUT/name.json."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
