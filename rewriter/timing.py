"""What one site takes, as the model has it and rewritten: time forward and backward, and bytes that wait in between.

Both run as they would in the model: under Inductor each is compiled by Inductor, under eager each runs as it is. They
see tensors of the matched shapes, dtypes, strides and device, made for this and freed afterwards: the model's own are
not touched. Long token dimensions are cut where the sample would not fit in memory, or one call would take too long.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch.utils import _pytree as pytree

from rewriter.execute import execute
from rewriter.legality import Site
from rewriter.meta import tensor_meta
from rewriter.subgraph import extract
from rewriter.verify import MAX_TOKENS, cuts, draw, exactly_autocast

SECONDS = 0.5  # of repetitions in one measurement, as far as they are not too few then
FEWEST, MOST = 5, 100  # repetitions of each side
LONGEST_CALL = 1.0  # seconds: where one call of the original takes longer, tokens are cut
LONGEST = 120  # seconds that any part of a measurement may take: after that, training goes on without it
COPIES = 3  # times what the tensors of a site take: their gradients, and what is made on the way
SHARE = 0.5  # of free memory that a measurement may take
CPU_BYTES = 4 << 30  # that it may take at most on a CPU, where size is time


class Unmeasured(Exception):
    """A site that can't be timed, in words."""


@dataclass(frozen=True)
class Cost:
    """What one way to compute a site takes, forward and backward together.

    ms:       median time of the device, in milliseconds
    host_ms:  until the host has issued all of it; 0 on a CPU, which is the device
    kept:     bytes that wait for backward beside the site's inputs
    noise_ms: twice the standard error of the median of its differences to the replacement, in turns
    """

    ms: float
    host_ms: float
    kept: int
    noise_ms: float = 0.0


@dataclass(frozen=True)
class Timing:
    """A replacement, what it replaces, and that with its smaller rewrites (if there are any); measured on `at`."""

    new: Cost
    old: Cost
    parts: Cost | None
    at: str


def time_site(site: Site, parts: Sequence[Site], executor: str) -> Timing:
    """Measure; raises whatever goes wrong, and Unmeasured where nothing can be run.

    parts: smaller sites inside of this one, which would be rewritten if this one is not
    """
    device = tensor_meta(site.outputs[0]).device
    if device.type not in ("cpu", "cuda"):
        raise Unmeasured(f"no clock for {device.type}")
    clock = _Gpu(device) if device.type == "cuda" else _Cpu()
    longest = max((s for n in site.inputs for s in tensor_meta(n).shape), default=1)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            while True:
                sizes, longest = _sizes_that_fit(site, longest, clock.free_bytes())
                leaves = _apart(_leaves, site, sizes)
                ways = _ways(site, parts, executor, sizes, leaves)
                may_cut = longest > MAX_TOKENS and _cut_to(site, max(MAX_TOKENS, longest // 2)) != sizes
                seconds, costs = _apart(_costs, ways, leaves, clock, LONGEST_CALL if may_cut else math.inf)
                if costs:
                    break
                longest = max(MAX_TOKENS, min(longest // 2, int(longest * LONGEST_CALL / seconds)))
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what was large here would lie in pieces between what the model needs
    new, old, *rest = costs
    return Timing(new, old, rest[0] if rest else None, _words(leaves, sizes))


def _apart(function: Callable, *arguments: Any) -> Any:
    """Run in a thread of its own: fresh grad mode, autocast, hooks and modes, whatever the model is running in.

    Nothing may be compiled there: Dynamo's lock is held by the caller.
    """
    box: list[Any] = []

    def work() -> None:
        try:
            box.append(function(*arguments))
        except Exception as error:
            box.append(error.with_traceback(None))  # whose frames hold the tensors of what may have run out of memory

    thread = threading.Thread(target=work, name="rewriter-timing", daemon=True)
    thread.start()
    thread.join(LONGEST)
    if not box:
        raise Unmeasured(f"it took more than {LONGEST} seconds")
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def _costs(ways: list, leaves: _Leaves, clock: _Cpu | _Gpu, limit: float) -> tuple[float, list[Cost]]:
    """Seconds of one call of the original, and the cost of each way if those are no more than `limit`."""
    with clock:
        sides = [_Side(way, leaves) for way in ways]
        seconds = clock.seconds(sides[1])
        return seconds, _in_turns(sides, clock) if seconds <= limit else []


# ---- what is run


@dataclass(frozen=True)
class _Leaves:
    """What a site is run on: its inputs, those of them whose gradient is wanted, and the autocasts it is under."""

    inputs: list[torch.Tensor]
    wanted: list[torch.Tensor]
    casts: tuple

    def ambient(self) -> contextlib.ExitStack:
        """The grad mode and autocast of the model."""
        stack = contextlib.ExitStack()
        stack.enter_context(torch.set_grad_enabled(bool(self.wanted)))
        stack.enter_context(exactly_autocast(self.casts, dict(enumerate(self.inputs))))
        return stack


def _leaves(site: Site, sizes: Mapping[int, int]) -> _Leaves:
    samples, _ = draw(site, dict(sizes))
    enabled, casts = site.outputs[0].meta.get("ambient") or (True, ())
    wanted = {n for n in site.inputs if tensor_meta(n).requires_grad} if enabled else set()
    leaves = {n: s.detach().requires_grad_(n in wanted) for n, s in samples.items()}
    return _Leaves([leaves[n] for n in site.inputs], [leaves[n] for n in site.inputs if n in wanted], casts)


def _ways(
    site: Site, parts: Sequence[Site], executor: str, sizes: Mapping[int, int], leaves: _Leaves
) -> list[Callable]:
    """Replacement, original, and the original with its parts rewritten, as the executor runs them."""
    ways = []
    for rewritten in ([site], [], *([parts] if parts else [])):
        module = extract(site.inputs, site.covered, site.outputs, sizes, rewritten)
        for node in module.graph.nodes:
            node.meta = {}  # shapes of another trace
        # Backward, too, is compiled here: when it runs, in another thread, it would wait for the lock of this one.
        with leaves.ambient(), functorch_config.patch(force_non_lazy_backward_lowering=True):
            ways.append(execute(module, leaves.inputs, executor))
    return ways


class _Side:
    """One way to compute a site: called, it runs forward and backward. `kept`: bytes that waited for backward."""

    def __init__(self, function: Callable, leaves: _Leaves):
        self._function, self._leaves = function, leaves
        self._upstream: list[torch.Tensor] | None = None
        self.kept = bytes_kept(self.forward, leaves.inputs) if leaves.wanted else 0

    def forward(self) -> list[torch.Tensor]:
        with self._leaves.ambient():
            return list(self._function(*self._leaves.inputs))

    def __call__(self) -> None:
        results = [r for r in self.forward() if r.requires_grad]
        if not results:
            return
        if self._upstream is None:
            self._upstream = [torch.randn_like(r) for r in results]
        torch.autograd.grad(results, self._leaves.wanted, self._upstream, allow_unused=True)


def _words(leaves: _Leaves, sizes: Mapping[int, int]) -> str:
    """What was run, by its largest input."""
    main = max(leaves.inputs, key=lambda t: (t.is_floating_point(), t.dim(), t.numel()))
    cut = " (cut from longer ones)" if set(sizes.values()) & {s for t in leaves.inputs for s in t.shape} else ""
    return f"{str(main.dtype).removeprefix('torch.')} {list(main.shape)}{cut}"


def bytes_kept(forward: Callable[[], list[torch.Tensor]], alive: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages that wait for the backward of what `forward` gives, without those of `alive`."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = forward()
    todo, seen = [r.grad_fn for r in results if r.grad_fn is not None], set()
    while todo:  # what an autograd.Function keeps in attributes: AOTAutograd does, too
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        attributes = pytree.tree_leaves(list(getattr(node, "__dict__", {}).values()))
        saved += [value for value in attributes if isinstance(value, torch.Tensor)]
        todo += [following for following, _ in node.next_functions if following is not None]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    for tensor in alive:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storages.values())


def _sizes_that_fit(site: Site, longest: int, free: float) -> tuple[dict[int, int], int]:
    """How sizes are cut, and the longest token dimension that is left by it."""
    sizes: dict[int, int] = {}
    while (needed := COPIES * _bytes(site, sizes)) > free:
        if longest <= MAX_TOKENS:
            raise Unmeasured(f"it takes about {needed / 2**30:.1f} GiB, where {free / 2**30:.1f} may be used")
        longest = max(MAX_TOKENS, longest // 2)
        sizes = _cut_to(site, longest)
    return sizes or _cut_to(site, longest), longest


def _cut_to(site: Site, longest: int) -> dict[int, int]:
    plans = cuts(site, longest, rows=1 << 40)  # a weight stays whole: its products are what takes the time
    return plans[0] if plans else {}


def _bytes(site: Site, sizes: Mapping[int, int]) -> int:
    metas = [m for n in (*site.inputs, *site.covered) if (m := tensor_meta(n)) is not None]
    return sum(math.prod(sizes.get(s, s) for s in m.shape) * m.dtype.itemsize for m in metas)


# ---- how it is timed


def _in_turns(sides: Sequence[_Side], clock: _Cpu | _Gpu) -> list[Cost]:
    """The cost of each side. They take turns, so that all of them see the same clocks; every other round backwards."""
    a_round = sum(clock.seconds(side) for side in sides)  # also warms up
    repeats = min(MOST, max(FEWEST, int(SECONDS / max(a_round, 1e-9))))
    times: list[list[tuple[float, float]]] = [[] for _ in sides]
    for number in range(repeats):
        places = range(len(sides))
        for place in places if number % 2 else reversed(places):
            times[place].append(clock.milliseconds(sides[place]))
    costs = []
    for side, own in zip(sides, times, strict=True):
        device, host = ([t[i] for t in own] for i in range(2))
        costs.append(Cost(statistics.median(device), statistics.median(host), side.kept))
    return [costs[0]] + [
        replace(cost, noise_ms=_noise([a - b for (a, _), (b, _) in zip(times[0], own, strict=True)]))
        for cost, own in zip(costs[1:], times[1:], strict=True)
    ]


def _noise(differences: list[float]) -> float:
    """Twice the standard error of a median, by the median absolute deviation: a few outliers say nothing."""
    middle = statistics.median(differences)
    deviation = 1.4826 * statistics.median(abs(d - middle) for d in differences)
    return 2 * 1.2533 * deviation / math.sqrt(len(differences))


class _Cpu:
    """Wall time."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass

    @staticmethod
    def free_bytes() -> float:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            free = CPU_BYTES
        return min(SHARE * free, CPU_BYTES)

    @staticmethod
    def seconds(side: Callable[[], None]) -> float:
        """Of one call, after one that compiles and warms up."""
        side()
        start = time.perf_counter()
        side()
        return time.perf_counter() - start

    def milliseconds(self, side: Callable[[], None]) -> tuple[float, float]:
        start = time.perf_counter()
        side()
        return 1e3 * (time.perf_counter() - start), 0.0


class _Gpu:
    """The device's time by events, with a cold L2 cache, while the host has run ahead; and the host's own time."""

    CYCLES = 2_000_000  # that the device waits in a millisecond, or a little longer
    MOST_CYCLES = 200_000_000

    def __init__(self, device: torch.device):
        self._device, self._on_device = device, torch.cuda.device(device)
        self._wait_ms = 1.0

    def __enter__(self) -> None:
        self._on_device.__enter__()
        torch.cuda.synchronize()
        l2 = getattr(torch.cuda.get_device_properties(self._device), "L2_cache_size", 64 << 20)
        self._flush = torch.empty(2 * l2, dtype=torch.int8, device=self._device)

    def __exit__(self, *error: Any) -> None:
        del self._flush
        self._on_device.__exit__(*error)

    def free_bytes(self) -> float:
        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return SHARE * (free + unused)

    def seconds(self, side: Callable[[], None]) -> float:
        """Of one call, launches and all, after one that compiles and warms up."""
        for _ in range(2):
            side()
        torch.cuda.synchronize()
        start = time.perf_counter()
        side()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        self._wait_ms = max(self._wait_ms, 2e3 * (launched - start))
        return time.perf_counter() - start

    def milliseconds(self, side: Callable[[], None]) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(min(int(self._wait_ms * self.CYCLES), self.MOST_CYCLES))
        start.record()
        before = time.perf_counter()
        side()
        host = time.perf_counter() - before
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), 1e3 * host
