"""Is a rewrite that is right also worth its place? By the shipped table, by measuring here and now, or taken as given.

    cost = device time + what its launches take the host beyond the other's + memory_rate * GiB that wait for backward

A rewrite is kept where its cost is not higher than that of what it replaces, or higher by no more than noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rewriter import cache, fingerprint
from rewriter.decisions import Decision, decision
from rewriter.execute import resolve
from rewriter.legality import Site
from rewriter.log import log
from rewriter.meta import TensorMeta, tensor_meta
from rewriter.pattern import Match
from rewriter.report import Measured
from rewriter.site_key import key_of, words_of
from rewriter.timing import Cost, Timing, Unmeasured, time_site

MODES = ("shipped", "measure", "all")
# Milliseconds that a GiB is worth which need not wait for backward: what an H100 takes to read it once (3.0 TB/s). So
# memory decides between rewrites that are nearly as fast, and costs a step no more than this. Where memory is what
# a run lacks, about 6 is fair: an estimate of what checkpointing pays (8B LoRA: a third of 285 ms for about 16 GiB).
MEMORY_RATE = 0.35
NOISE, MOST_NOISE = 0.03, 0.1  # of the original's time: less is no difference, more is one, however they scatter
HOST_NOISE, HOST_NOISE_MS = 0.25, 0.02  # the same for launches, which vary more
GIB = 2**30


class Verdict(NamedTuple):
    """Whether a rewrite is worth its place, why not, and what was measured (with "measure")."""

    keep: bool
    reason: str = ""
    measured: Measured | None = None


class Selection:
    """Decides for all graphs of a model; what it measures it measures once for equal sites, and at one length each."""

    def __init__(self, mode: str, executor: str, memory_rate: float = MEMORY_RATE):
        self.mode, self._executor, self._memory_rate = mode, executor, memory_rate
        self._known: dict[Any, tuple[Timing | str, bool]] = {}
        self._lengths: dict[Any, list[tuple[tuple[TensorMeta, ...], Any]]] = {}

    def library(self, match: Match) -> str | None:
        """The library's own operator that the model calls at this place, where the table says that it stays."""
        if self.mode != "shipped":
            return None
        call = match.pattern.library(match)
        return None if call is None or self._shipped(match, call).apply else call

    def verdict(self, site: Site, parts: Sequence[Site] = ()) -> Verdict:
        """Of a site that is legal and proven. parts: smaller ones in it, that would be rewritten in its place."""
        if self.mode == "all":
            return Verdict(True)
        shipped = self._shipped(site.matches[0], _library(site.matches[0]))
        if self.mode == "shipped":
            return Verdict(shipped.apply, "" if shipped.apply else f"it does not pay: {shipped.figures}")
        executor = resolve(self._executor, tensor_meta(site.outputs[0]).device.type)
        timing, stored = self._timing(site, parts, executor)
        if isinstance(timing, str):
            reason = "" if shipped.apply else f"it does not pay: {shipped.figures}; not measured: {timing}"
            return Verdict(shipped.apply, reason, Measured(note=f"not measured: {timing}"))
        others = [(timing.old, "")]
        if timing.parts is not None:
            others.append((timing.parts, ", ".join(dict.fromkeys(part.pattern for part in parts))))
        better = [pair for pair in others if loses(timing.new, pair[0], self._memory_rate)]
        other, against = min(better or others, key=lambda pair: total(pair[0], self._memory_rate))
        measured = _measured(timing, other, against, stored)
        return Verdict(not better, sentence(measured) if better else "", measured)

    def _shipped(self, match: Match, library: str | None) -> Decision:
        device = match.root.meta.device
        return decision(match.pattern.name, resolve(self._executor, device.type), device, library is not None)

    def _timing(self, site: Site, parts: Sequence[Site], executor: str) -> tuple[Timing | str, bool]:
        """A timing, or why there is none; and whether it was stored before."""
        family, metas = _family(site), tuple(tensor_meta(n) for n in site.inputs)
        for known, key in self._lengths.setdefault(family, []):
            if _differ_in_changing_sizes_only(metas, known):
                return self._known[key]
        key = key_of(site), tuple(map(key_of, parts)), executor
        if key not in self._known:
            self._known[key] = _timing(site, parts, executor)
        self._lengths[family].append((metas, key))
        return self._known[key]


def _library(match: Match) -> str | None:
    try:
        return match.pattern.library(match)
    except Exception as error:  # of a plugin's; it is none then
        log.warning("%s: library raised %s: %s", match.pattern.name, type(error).__name__, error)
        return None


def total(cost: Cost, memory_rate: float) -> float:
    """Milliseconds: of the device, and what waiting for backward is worth."""
    return cost.ms + memory_rate * cost.kept / GIB


def loses(new: Cost, old: Cost, memory_rate: float) -> bool:
    """Whether the replacement costs more than what it replaces; a tie within noise does not."""
    extra = launches(new, old)
    noise = min(max(NOISE * old.ms, old.noise_ms), MOST_NOISE * old.ms)
    return total(new, memory_rate) + extra - total(old, memory_rate) > noise


def launches(new: Cost, old: Cost) -> float:
    """Milliseconds that the host needs longer for the replacement's launches, where the device would wait for them.

    The time of a step is the host's or the device's, whichever is longer; of one site nobody can tell which.
    """
    extra = new.host_ms - old.host_ms
    noise = max(HOST_NOISE * old.host_ms, HOST_NOISE_MS)
    return extra if new.host_ms > new.ms and extra > noise else 0.0


def sentence(measured: Measured) -> str:
    """Why a rewrite that was measured is not made."""
    instead = f" with {measured.against} alone" if measured.against else ""
    if measured.new_ms > measured.old_ms:
        return f"measured slower: {measured.new_ms:.3g} ms for {measured.old_ms:.3g} ms{instead}{_more(measured)}"
    if measured.new_host_ms > measured.old_host_ms and measured.new_host_ms > measured.new_ms:
        launch = f"{measured.new_host_ms:.3g} ms of the host for {measured.old_host_ms:.3g} ms"
        times = f"{measured.new_ms:.3g} ms of the device for {measured.old_ms:.3g} ms"
        return f"measured slower to launch: {launch}{instead}, {times}{_more(measured)}"
    sizes = f"{measured.new_mib:.3g} MiB for {measured.old_mib:.3g} MiB wait for backward{instead}"
    return f"measured larger: {sizes}, {measured.new_ms:.3g} ms for {measured.old_ms:.3g} ms"


def _more(measured: Measured) -> str:
    if measured.new_mib <= measured.old_mib:
        return ""
    return f", and {measured.new_mib:.3g} MiB for {measured.old_mib:.3g} MiB wait for backward"


def _measured(timing: Timing, other: Cost, against: str, stored: bool) -> Measured:
    new = timing.new
    return Measured(
        other.ms, new.ms, other.host_ms, new.host_ms, other.kept / 2**20, new.kept / 2**20, against, timing.at, stored
    )


def _timing(site: Site, parts: Sequence[Site], executor: str) -> tuple[Timing | str, bool]:
    try:
        key = _stored_under(site, parts, executor)
        if key is not None and (known := _read(cache.load(key))) is not None:
            return known, True
        timing = time_site(site, parts, executor)
    except Exception as error:
        reason = str(error) if isinstance(error, Unmeasured) else f"{type(error).__name__}: {error}"
        log.warning("%s at %s could not be measured: %s", site.pattern, site.outputs[0].name, reason)
        return reason.strip().partition("\n")[0][:300], False
    log.info("measured %s at %s: %s", site.pattern, site.outputs[0].name, timing)
    if key is not None:
        cache.store(key, dataclasses.asdict(timing))
    return timing, False


def _stored_under(site: Site, parts: Sequence[Site], executor: str) -> dict[str, Any] | None:
    """What a stored measurement depends on; None where a source can't be read, which then may change unseen."""
    things = [thing for s in (site, *parts) for thing in (type(s.matches[0].pattern), s.call.fn)]
    text = fingerprint.sources(things)
    if text is None:
        return None
    around = fingerprint.surroundings(tensor_meta(site.outputs[0]).device)
    return {
        "site": words_of(site),
        "parts": [words_of(p) for p in parts],
        "executor": executor,
        "sources": text,
        **around,
    }


def _read(stored: Mapping[str, Any] | None) -> Timing | None:
    """A timing as it was stored, if it is one."""

    def cost(fields: Mapping[str, Any]) -> Cost:
        made = Cost(**fields)
        if not all(type(v) in (int, float) and 0 <= v < 1e15 for v in fields.values()):
            raise ValueError("no number of a measurement")
        return made

    try:
        parts = stored["parts"] and cost(stored["parts"])
        return Timing(cost(stored["new"]), cost(stored["old"]), parts, str(stored["at"]))
    except (TypeError, ValueError, KeyError):
        return None


def _family(site: Site) -> Any:
    """Equal for sites of one spelling and call that differ in sizes only."""
    metas = [tensor_meta(n) for n in site.inputs]
    kinds = tuple((m.dtype, m.device, m.requires_grad, m.ndim) for m in metas)
    spellings = tuple(match.reference for match in site.matches)
    return site.matches[0].pattern, spellings, site.call.fn, kinds, site.outputs[0].meta.get("ambient")


def _differ_in_changing_sizes_only(metas: tuple[TensorMeta, ...], known: tuple[TensorMeta, ...]) -> bool:
    pairs = zip(metas, known, strict=True)
    sizes = [row for m, k in pairs for row in zip(m.shape, k.shape, m.static, k.static, strict=True)]
    changing = any(not (now and then) for _, _, now, then in sizes)
    return changing and all(a == b or not (now and then) for a, b, now, then in sizes)
