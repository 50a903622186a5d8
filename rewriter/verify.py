"""Prove a replacement on numbers before it is installed.

For every output and every gradient, with truth in float64 on fresh inputs of the matched shapes, dtypes and strides:

    ||new - truth|| <= 2 * ||old - truth|| + floor(dtype) * ||truth||

NaN never passes. Long token dimensions are cut, so memory and time are bounded; a match is proven once per backend.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rewriter.legality import Site, significant_strides
from rewriter.meta import TensorMeta, tensor_meta
from rewriter.sizes import shorter
from rewriter.subgraph import Float64, extract

# Relative error that rounding alone explains, by the dtype of the compared tensor.
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
MAX_TOKENS = 64  # rows along each token dimension that verification looks at
MAX_ROWS = 4099  # rows of a weight (classes of a head) that verification looks at
MAX_ELEMENTS = 1 << 28  # of any one tensor in a verification that can't be cut
OWN_BACKWARD = 8  # floors that rounding explains in a model's own autograd.Function
LARGE = 64.0  # times the usual upstream gradient: float16 can still hold what it becomes
SCALES = (1.0, 1e-3)  # magnitudes of the inputs: the second tells an epsilon from another


@dataclass(frozen=True)
class Check:
    """Error norms, relative to the truth's, of one output or gradient, in the worst of the samples."""

    what: str
    dtype: str
    old_error: float
    new_error: float
    passed: bool


@dataclass(frozen=True)
class Verification:
    """Outcome of one proof: its checks, or the reason why it could not be carried out."""

    passed: bool
    checks: tuple[Check, ...] = ()
    reason: str = ""


def verify(site: Site, seed: int = 0) -> Verification:
    """Compare original and replacement on numbers. Runs in a thread of its own: fresh grad mode, autocast and hooks."""
    box: list[Any] = []

    def work() -> None:
        try:
            box.append(_verify(site, seed))
        except Exception as error:  # whatever goes wrong in a proof, the site stays as it was
            box.append(Verification(False, reason=f"{type(error).__name__}: {error}"))

    # The caller may be inside checkpointing's saved-tensor hooks, autocast or a dispatch mode: all are thread-local.
    thread = threading.Thread(target=work, name="rewriter-verify")
    thread.start()
    thread.join()
    return box[0]


def _verify(site: Site, seed: int) -> Verification:
    plans = cuts(site)
    failure = ""
    for sizes in plans:
        try:
            checks: dict[str, Check] = {}
            for scale in SCALES:
                for check in _compare(site, sizes, scale, seed):
                    worst = checks.get(check.what)
                    if worst is None or (worst.passed, -worst.new_error) > (check.passed, -check.new_error):
                        checks[check.what] = check
            bad = [c for c in checks.values() if not c.passed]
            reasons = [f"{c.what}: error {c.new_error:.1e} where the original has {c.old_error:.1e}" for c in bad]
            return Verification(not bad, tuple(checks.values()), "; ".join(reasons))
        except _Wrong as error:
            return Verification(False, reason=str(error))
        except _Unrunnable as error:
            failure = str(error)
    return Verification(False, reason=f"could not be verified: {failure}")


class _Unrunnable(Exception):
    """The original can't run at these sizes."""


class _Wrong(Exception):
    """Something other than its numbers is wrong with the replacement."""


@contextlib.contextmanager
def _random_numbers(seed: int, states: list[list[torch.Tensor]]) -> Iterator[None]:
    """Random numbers from `seed` inside; the state that is left joins `states`, and every generator is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
        states.append(_random_state())


def _random_state() -> list[torch.Tensor]:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *on_devices]


def cuts(site: Site, longest: int = MAX_TOKENS, rows: int = MAX_ROWS) -> list[dict[int, int]]:
    """Ways to cut sizes (size -> smaller size), best first; the last leaves them whole if that fits in memory.

    longest: of a token dimension that is left; rows: of a weight, which is cut where it has more than twice as many
    """
    given = [site.matches[0].pattern.cut(match, longest) for match in site.matches]
    if any(cut is None for cut in given):
        return _plans([tensor_meta(n) for n in site.inputs], longest, rows)
    return [{size: small for cut in given for size, small in cut.items()}]


def _plans(metas: list[TensorMeta], longest: int, rows: int) -> list[dict[int, int]]:
    floats = [m for m in metas if m.dtype.is_floating_point]
    main = max(floats, key=lambda m: (m.ndim, m.numel()), default=None)
    whole = [{}] if max((m.numel() for m in metas), default=0) <= MAX_ELEMENTS else []
    if main is None or main.ndim < 2:
        return whole
    widths = {m.shape[-1] for m in floats if m.ndim}
    weights = {m.shape[0] for m in floats if m.ndim == 2 and m is not main}
    cut = shorter(main.shape, longest, widths | weights)
    cut |= {size: rows for size in weights - widths if size > 2 * rows and size not in cut}
    return [cut, *whole] if cut else whole


def _compare(site: Site, sizes: dict[int, int], scale: float, seed: int) -> list[Check]:
    match_of = {v.node: (m, name) for m in site.matches for name, v in m.tensors.items()}
    samples, generators = draw(site, sizes, scale, seed)
    original = extract(site.inputs, site.covered, site.outputs, sizes)
    ambient = site.outputs[0].meta.get("ambient") or (True, ())
    differentiable = [n for n in site.inputs if tensor_meta(n).requires_grad] if ambient[0] else []

    def old(values: dict[fx.Node, torch.Tensor]) -> Any:
        return original(*(values[n] for n in site.inputs))

    def truth(values: dict[fx.Node, torch.Tensor]) -> Any:
        return Float64(original).run(*(values[n] for n in site.inputs))

    def new(values: dict[fx.Node, torch.Tensor]) -> Any:
        args, kwargs = pytree.tree_map_only(fx.Node, values.__getitem__, (site.call.args, dict(site.call.kwargs)))
        return site.call.fn(*args, **kwargs)

    exact = {n: _exact(s) for n, s in samples.items()}
    states: list[list[torch.Tensor]] = []
    try:
        with _random_numbers(seed, states), exactly_autocast(ambient[1], samples):
            expected, upstream = _run(old, samples, differentiable, None, generators)
        with _random_numbers(seed, []), exactly_autocast((), samples):
            true, _ = _run(truth, exact, differentiable, upstream, generators)
    except Exception as error:
        raise _Unrunnable(f"{type(error).__name__}: {error}") from error
    coarsest = _coarsest_floor(site)
    names = [f"output {i}" for i in range(len(site.outputs))]
    names += [f"gradient of {match_of.get(n, (None, n.name))[1]}" for n in differentiable]
    if any(n.meta.get("forward") is not None for n in site.covered):
        _check_own_backward(names, expected, true, coarsest)
        larger = [u * LARGE for u in upstream]  # a gradient that is cut off, say, is none of a derivative
        with _random_numbers(seed, []), exactly_autocast(ambient[1], samples):
            expected_of_large, _ = _run(old, samples, differentiable, larger, generators)
        with _random_numbers(seed, []), exactly_autocast((), samples):
            true_of_large, _ = _run(truth, exact, differentiable, larger, generators)
        _check_own_backward(names, expected_of_large, true_of_large, coarsest)
    before = {n: s.clone() for n, s in samples.items()}
    with _random_numbers(seed, states), exactly_autocast(ambient[1], samples):
        got, _ = _run(new, samples, differentiable, upstream, generators)
    if not all(map(torch.equal, *states)):
        raise _Wrong("the replacement draws other random numbers")
    for node, sample in samples.items():
        if not torch.equal(sample, before[node]):
            raise _Wrong(f"the replacement writes its input {match_of.get(node, (None, node.name))[1]}")
    for result, node in zip(got, site.outputs, strict=False):
        if significant_strides(result) != significant_strides(expected[site.outputs.index(node)]):
            raise _Wrong(f"the replacement's strides are {result.stride()} where {node.name} has others")
    rounding = coarsest / 2 if any(m.pattern.rounds_once(m) for m in site.matches) else 0.0
    return [_check(*row, coarsest, rounding) for row in zip(names, got, expected, true, strict=True)]


def draw(
    site: Site, sizes: dict[int, int], scale: float = SCALES[0], seed: int = 0
) -> tuple[dict[fx.Node, torch.Tensor], dict[torch.device, torch.Generator]]:
    """An input for each of the site's, of the matched dtypes and layouts, with `sizes` cut; what they were drawn by."""
    generators: dict[torch.device, torch.Generator] = {}
    match_of = {v.node: (m, name) for m in site.matches for name, v in m.tensors.items()}
    samples = {}
    for node in site.inputs:
        match, name = match_of.get(node, (site.matches[0], node.name))
        meta = tensor_meta(node)
        if meta.device not in generators:
            generators[meta.device] = torch.Generator(meta.device).manual_seed(seed)
        generator = generators[meta.device]
        shapes = {name: _cut(meta, sizes), **{n: _cut(v.meta, sizes) for n, v in match.tensors.items()}}
        given = match.pattern.sample(match, name, shapes, generator)
        if scale != SCALES[0] and meta.dtype.is_floating_point:
            given = None  # whatever a pattern likes to be tried on, once it is tried on plain numbers
        samples[node] = _sample(given, meta, _cut(meta, sizes), scale, generator)
    return samples, generators


def _coarsest_floor(site: Site) -> float:
    metas = [m for n in (*site.inputs, *site.covered) if (m := tensor_meta(n)) is not None]
    return max((FLOOR.get(m.dtype, 0.0) for m in metas), default=0.0)


def _check_own_backward(names: list[str], expected: list, true: list, coarsest: float) -> None:
    """The truth has the derivative of a forward; an autograd.Function may have any other backward, which then stays.

    Rounding leaves each number within a few floors, and their size, to which it adds up, far nearer.
    """
    for name, old, truth in zip(names, expected, true, strict=True):
        if old is None and truth is None:
            continue
        right = old is not None and truth is not None
        if right:
            old, size = old.double(), truth.norm()
            right = bool((old - truth).norm() <= OWN_BACKWARD * coarsest * size)
            bias = ((old - truth) * truth).sum().abs()
            right = right and bool(bias <= (1e-3 + OWN_BACKWARD * coarsest / max(1, truth.numel()) ** 0.5) * size**2)
        if not right:
            raise _Wrong(f"{name} of the model's own autograd.Function is not what its forward says")


def _exact(sample: torch.Tensor) -> torch.Tensor:
    if sample.is_complex():
        return sample.to(torch.complex128)
    return sample.double() if sample.is_floating_point() else sample


def _run(
    function: Callable, samples: dict, differentiable: list, upstream: list | None, generators: dict
) -> tuple[list, list]:
    """Outputs and gradients of `function`; a fresh upstream gradient where none is given."""
    leaves = {n: s.detach().requires_grad_(n in differentiable) for n, s in samples.items()}
    with torch.enable_grad():
        results = function(leaves)
        results = list(results) if isinstance(results, tuple | list) else [results]
        if upstream is None:
            upstream = [
                torch.randn(r.shape, generator=generators[r.device], device=r.device, dtype=torch.float32)
                for r in results
            ]
        gradients: list = []
        if differentiable:
            live = [(r, u.to(r.dtype)) for r, u in zip(results, upstream, strict=True) if r.requires_grad]
            gradients = list(
                torch.autograd.grad(
                    [r for r, _ in live], [leaves[n] for n in differentiable], [u for _, u in live], allow_unused=True
                )
            )
    return [r.detach() for r in results] + gradients, upstream


def _check(
    what: str, new: torch.Tensor | None, old: torch.Tensor | None, truth: torch.Tensor | None, coarsest: float,
    rounding: float,
) -> Check:  # fmt: skip
    if new is None or old is None or truth is None:
        same = new is None and old is None
        return Check(what, "", 0.0, 0.0 if same else math.inf, same)
    if new.shape != old.shape or new.dtype != old.dtype:
        return Check(what, str(old.dtype), 0.0, math.inf, False)
    truth = truth.double()
    size = torch.linalg.vector_norm(truth).item()
    old_error, new_error = (torch.linalg.vector_norm(t.double() - truth).item() for t in (old, new))
    floor = max(FLOOR.get(new.dtype, 0.0), rounding)
    if new.numel() < 64:  # so few numbers say little of the original's error: allow what its coarsest type explains
        floor = max(floor, coarsest / 8)
    limit = 2 * old_error + floor * size
    passed = bool(new_error <= limit)  # False for NaN
    return Check(what, str(new.dtype).removeprefix("torch."), old_error / (size or 1), new_error / (size or 1), passed)


def _cut(meta: TensorMeta, sizes: dict[int, int]) -> tuple[int, ...]:
    return tuple(sizes.get(s, s) for s in meta.shape)


def _sample(
    given: Any, meta: TensorMeta, shape: tuple[int, ...], scale: float, generator: torch.Generator
) -> torch.Tensor:
    """A tensor of the matched dtype and layout: expanded dimensions stay expanded, numbers that lie apart stay so."""
    expanded = [s == 0 and n > 1 for s, n in zip(meta.stride, meta.shape, strict=True)]
    base = [1 if e else n for e, n in zip(expanded, shape, strict=True)]
    if given is None:
        if meta.dtype.is_floating_point or meta.dtype.is_complex:
            dtype = torch.complex64 if meta.dtype.is_complex else None
            given = torch.randn(base, generator=generator, device=meta.device, dtype=dtype)
            if meta.ndim > 1:
                given = given * scale
        else:
            given = torch.randint(0, 2, base, generator=generator, device=meta.device)
    elif any(expanded):
        return given.to(meta.device, meta.dtype)
    return _laid_out(given.to(meta.device, meta.dtype), meta).expand(shape)


def _laid_out(given: torch.Tensor, meta: TensorMeta) -> torch.Tensor:
    """`given` in the memory order of `meta`, with as much between its numbers and rows; that is NaN, or -1."""
    strides, step, end = [0] * meta.ndim, 1, 1
    for d in reversed(meta.order()):
        if meta.shape[d] == 1 or meta.stride[d] == 0:
            strides[d] = step
            continue
        step += max(meta.stride[d] - end, 0)
        strides[d] = step
        end, step = meta.stride[d] * meta.shape[d], step * given.shape[d]
    size = 1 + sum((n - 1) * s for n, s in zip(given.shape, strides, strict=True)) if given.numel() else 0
    floats = given.is_floating_point() or given.is_complex()
    storage = torch.full((size,), math.nan if floats else -1, device=given.device).to(given.dtype)
    return storage.as_strided(given.shape, strides).copy_(given)


class exactly_autocast:
    """Exactly these (device type, dtype) autocasts, for every device type involved."""

    def __init__(self, enabled: tuple, samples: Mapping[Any, torch.Tensor]):
        kinds = {s.device.type for s in samples.values()} | {"cpu"}
        dtypes = dict(enabled)
        self._contexts = [torch.autocast(k, dtype=dtypes.get(k), enabled=k in dtypes) for k in sorted(kinds)]

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)
