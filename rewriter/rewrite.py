"""The passes over one graph: shadow, match, legality, conflicts, groups, verification, selection, replacement."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from rewriter.foreign import fused_tails
from rewriter.legality import Illegal, Legality, Site, written_nodes
from rewriter.log import log
from rewriter.matcher import find, find_lookalikes
from rewriter.own_loss import Logits, find_logits
from rewriter.pattern import Match, Pattern, is_narrowing
from rewriter.replace import LazyOutput, replace_sites
from rewriter.report import Measured
from rewriter.select import Selection
from rewriter.shadow import Value, build_shadow
from rewriter.site_key import key_of
from rewriter.verify import Verification, verify

ADAPTERS = "lora"  # on a head, they go where its logits go
TAIL = "linear_cross_entropy"  # what a tail that somebody else has fused counts as


@dataclass(frozen=True)
class Refusal:
    """A match or near match that stays as it was. matched: the operators of a whole match, a composite's excepted.

    choice: it would be right and does not pay; measured: by these figures
    """

    pattern: str
    reason: str
    node: fx.Node | None
    matched: frozenset[fx.Node] = frozenset()
    choice: bool = False
    measured: Measured | None = None


@dataclass(frozen=True)
class Kept:
    """A place that stays because the model itself calls nothing worse there: `call`. nodes: its operators."""

    pattern: str
    outputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    call: str


class Applied(NamedTuple):
    """A site that is rewritten, with its proof (None when verification is off) and what was measured (or None)."""

    site: Site
    proof: Verification | None
    measured: Measured | None


@dataclass
class Result:
    """What rewriting one graph did.

    logits: those that the graph returns without a loss, computed on demand from now on
    """

    applied: list[Applied] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    lazy: list[LazyOutput] = field(default_factory=list)
    logits: list[Logits] = field(default_factory=list)


class Proofs:
    """Outcomes of verifications and of runs on fake tensors by what they depend on: equal matches are proven once."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.fakes: dict[Any, Any] = {}
        self._known: dict[Any, Verification] = {}

    def of(self, site: Site) -> Verification | None:
        """None where proofs are off, which trusts patterns; what the backward of a model's own function is, only a
        proof can tell."""
        if not self.enabled and all(node.meta.get("forward") is None for node in site.covered):
            return None
        key = key_of(site)
        if key not in self._known:
            self._known[key] = verify(site)
        return self._known[key]


class Fuel:
    """`REWRITER_FUEL=n` in the environment applies the first n rewrites only, to bisect a wrong one."""

    def __init__(self) -> None:
        text = os.environ.get("REWRITER_FUEL")
        if text and not text.isdigit():
            raise ValueError(f"REWRITER_FUEL is a number of rewrites, not {text!r}")
        self.left = int(text) if text else None

    def take(self) -> bool:
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


def rewrite(
    gm: fx.GraphModule,
    patterns: Iterable[Pattern],
    proofs: Proofs,
    fuel: Fuel,
    lazy: bool = True,
    leaves: Callable[[fx.Node], bool] | None = None,
    selection: Selection | None = None,
) -> Result:
    """Rewrite a lowered graph in place.

    selection: whether rewrites pay; by default the shipped table says so
    lazy:   outputs may be taken out of it, to be computed on demand
    leaves: tells of a node whether the graph ends the outermost forward there: then logits are on demand without a loss
    """
    result = Result()
    with torch._guards.tracing(None):  # what runs on fake tensors here must not touch the shapes Dynamo is tracing
        sites = choose_sites(gm.graph, patterns, proofs, selection or Selection("shipped", "auto"), result, lazy)
    names = {p.name for p in patterns}
    result.kept += [Kept(TAIL, (n,), (n,), call) for n, call in fused_tails(gm.graph) if TAIL in names]
    kept = [applied for applied in sites if fuel.take()]
    for site, *_ in sites[len(kept) :]:
        result.refused.append(Refusal(site.pattern, "REWRITER_FUEL is used up", site.outputs[0]))
    if lazy and leaves is not None and any(p.name == "linear_cross_entropy" for p in patterns):
        for found in find_logits(gm.graph, leaves):
            left = [a for a in kept if a.site.pattern != ADAPTERS or not set(a.site.outputs) <= set(found.nodes)]
            covered = {node for site, *_ in left for node in site.covered}
            taken = covered - {node for site, *_ in left for node in site.outputs}
            if not taken & {*found.nodes, found.promise.inputs[0]} and fuel.take():
                result.logits.append(found)
                kept = left
    result.lazy = replace_sites(gm, [site for site, *_ in kept], [found.promise for found in result.logits])
    result.applied = kept
    for site, *_ in kept:
        log.info("rewrote %s at %s", site.pattern, site.outputs[0].name)
    for refusal in result.refused:
        log.debug("near miss of %s at %s: %s", refusal.pattern, refusal.node, refusal.reason)
    return result


def choose_sites(
    graph: fx.Graph,
    patterns: Iterable[Pattern],
    proofs: Proofs,
    selection: Selection,
    result: Result,
    lazy: bool = True,
) -> list[Applied]:
    """Legal, proven sites that pay and don't overlap; larger ones first. What was refused is added to `result`."""
    writes = written_nodes(graph)
    shadow = build_shadow(graph, frozenset(n for n in writes if n.op != "placeholder"))
    legality = Legality(graph, shadow, writes, proofs.fakes, lazy)
    refused: dict[Any, Refusal] = {}
    candidates: list[Site] = []
    for pattern in patterns:
        matches, misses = _guarded(lambda p=pattern: find(shadow, p), pattern, refused) or ([], [])
        for miss in misses:
            node = _real(miss.at) or _real(miss.anchor)
            refused[pattern.name, miss.anchor] = Refusal(pattern.name, miss.reason, node)
        for match in matches:
            call = _guarded(lambda m=match: m.pattern.already(m) or selection.library(m), pattern, refused, match.root)
            if call:
                bound = tuple(v.node for v in match.bound.values() if v.node is not None)
                result.kept.append(Kept(pattern.name, match.outputs, bound, call))
                continue
            site = _legal_site(legality, match, refused)
            if site is not None:
                candidates.append(site)
        for match in _guarded(lambda p=pattern: list(find_lookalikes(shadow, p)), pattern, refused) or ():
            reason = _guarded(lambda m=match: m.pattern.why_not(m), pattern, refused, match.root)
            if reason:
                refused.setdefault((pattern.name, match.root), Refusal(pattern.name, reason, match.output))
    candidates = _without_greedy_composites(candidates)
    candidates.sort(key=lambda s: (-len(s.compute), -len(s.covered), legality.position[s.outputs[0]]))
    accepted: list[Applied] = []
    banned: set[int] = set()
    while True:
        taken = {node for site, *_ in accepted for node in site.compute}
        fresh = _without_overlap([c for c in candidates if id(c) not in banned], taken)
        if not fresh:
            break
        for group in _groups(legality, fresh, refused):
            _try(group, candidates, proofs, selection, accepted, refused)
        banned.update(id(site) for site in fresh)
    done = {node for site, *_ in accepted for node in site.compute}
    result.kept = [k for k in result.kept if k.outputs[0] not in done]
    done |= {node for k in result.kept for node in k.nodes}
    result.refused += [
        r
        for (_, at), r in refused.items()
        if r.choice or r.matched - done or not (_real(at) in done or (r.node is not None and r.node in done))
    ]  # part of a match may have become a smaller one: the logits' loss, where their head can't be in it
    return sorted(accepted, key=lambda applied: legality.position[applied.site.outputs[0]])


def _guarded(action: Callable, pattern: Pattern, refused: dict, root: Value | None = None) -> Any:
    """Run a plugin's code; what it raises becomes a reason, for the match with this root if there is one."""
    try:
        return action()
    except Illegal:
        raise
    except Exception as error:
        reason = f"the pattern raised {type(error).__name__}: {error}"
        log.warning("%s: %s", pattern.name, reason)
        refused[pattern.name, root or reason] = Refusal(pattern.name, reason, _real(root))
        return None


def _real(value: Any) -> fx.Node | None:
    while isinstance(value, Value) and value.node is None and value.inputs:
        value = value.inputs[0]
    return value.node if isinstance(value, Value) else None


def _legal_site(legality: Legality, match: Match, refused: dict) -> Site | None:
    """The site of one match, with a cast of its result taken in where that is legal."""
    for variant in (_with_trailing_cast(match), match):
        if variant is None:
            continue
        try:
            site = _guarded(lambda v=variant: legality.site((v,)), match.pattern, refused, match.root)
            if site is not None:
                return site
        except Illegal as error:
            if variant is match:
                refusal = Refusal(match.pattern.name, error.reason, error.node, _operators(match))
                refused[match.pattern.name, match.root] = refusal
    return None


def _operators(match: Match) -> frozenset[fx.Node]:
    return frozenset() if match.pattern.parts else frozenset(v.node for v in match.bound.values()) - {None}


def _with_trailing_cast(match: Match) -> Match | None:
    if len(match.outputs) > 1:
        return None
    users = list(match.root.node.users)
    if len(users) != 1 or len(match.root.users) != 1:
        return None
    cast = match.root.users[0]
    if cast.node is not users[0] or not is_narrowing(cast):
        return None
    return dataclasses.replace(match, root=cast)


def _without_greedy_composites(candidates: list[Site]) -> list[Site]:
    """Without composites that take a piece of something else than their parts: the sum in a rotation, say."""
    parts = [site.matches[0].pattern.parts for site in candidates]
    owners: dict[fx.Node, set[str]] = {}
    for site, own in zip(candidates, parts, strict=True):
        for node in site.compute if not own else ():
            owners.setdefault(node, set()).add(site.pattern)
    return [
        site
        for site, own in zip(candidates, parts, strict=True)
        if not own or all(owners.get(node, set()) <= set(own) for node in site.compute)
    ]


def _without_overlap(candidates: list[Site], taken: set[fx.Node]) -> list[Site]:
    kept, taken = [], set(taken)
    for site in candidates:
        if not (site.compute & taken):
            kept.append(site)
            taken |= site.compute
    return kept


def _groups(legality: Legality, sites: list[Site], refused: dict) -> list[list[Site]]:
    """Each entry: sites to try in order, the joint one first, then those it was made of."""
    by_pattern: dict[Pattern, list[Site]] = {}
    for site in sites:
        by_pattern.setdefault(site.matches[0].pattern, []).append(site)
    groups = []
    for pattern, own in by_pattern.items():
        own.sort(key=lambda s: legality.position[s.outputs[0]])
        site_of = {id(s.matches[0]): s for s in own}
        matches = [s.matches[0] for s in own]
        joined = _guarded(lambda p=pattern, m=matches: _partition(p.group(list(m)), m), pattern, refused)
        for group in joined if joined is not None else [(m,) for m in matches]:
            singles = [site_of[id(m)] for m in group]
            groups.append(singles)
            if len(group) > 1:
                try:
                    groups[-1] = [legality.site(tuple(group)), *singles]
                except Exception as error:  # a plugin's replacement may raise anything: its parts are tried alone
                    log.debug("%s: not joined: %s", pattern.name, error)
    return groups


def _partition(groups: Any, matches: list[Match]) -> list[tuple[Match, ...]]:
    """What a pattern's `group` gave, checked: every match in exactly one group."""
    groups = [tuple(group) for group in groups]
    given = sorted(id(m) for group in groups for m in group)
    if given != sorted(map(id, matches)) or not all(groups):
        raise ValueError("group must give every match exactly once")
    return groups


def _try(
    group: list[Site],
    candidates: list[Site],
    proofs: Proofs,
    selection: Selection,
    accepted: list[Applied],
    refused: dict,
) -> None:
    """Accept what is proven and pays: the joint site of a group, or those that it was made of."""
    if len(group[0].matches) > 1:
        if _tried(group[0], candidates, proofs, selection, accepted, {}):
            return
        group = group[1:]
    for site in group:
        _tried(site, candidates, proofs, selection, accepted, refused)


def _tried(
    site: Site,
    candidates: list[Site],
    proofs: Proofs,
    selection: Selection,
    accepted: list[Applied],
    refused: dict,
) -> bool:
    """Whether a site was accepted; if not, its reason is among the refusals."""
    at = site.pattern, site.matches[0].root
    proof = proofs.of(site)
    if proof is not None and not proof.passed:
        reason = f"verification: {proof.reason}"
        log.warning("%s at %s stays as it was: %s", site.pattern, site.outputs[0].name, reason)
        refused[at] = Refusal(site.pattern, reason, site.outputs[0], _operators(site.matches[0]))
        return False
    verdict = selection.verdict(site, _parts(site, candidates, proofs) if selection.mode == "measure" else ())
    if not verdict.keep:
        log.info("%s at %s stays as it was: %s", site.pattern, site.outputs[0].name, verdict.reason)
        operators, output = frozenset(v.node for v in site.matches[0].bound.values()) - {None}, site.outputs[0]
        if not any(r.choice and r.pattern == site.pattern and output in r.matched for r in refused.values()):
            refused[at] = Refusal(site.pattern, verdict.reason, output, operators, True, verdict.measured)
        return False
    accepted.append(Applied(site, proof, verdict.measured))
    return True


def _parts(site: Site, candidates: list[Site], proofs: Proofs) -> list[Site]:
    """Sites of other patterns that lie inside of one: they would be rewritten if that is not."""
    covered = set(site.covered)
    inside = [c for c in candidates if c.pattern != site.pattern and covered.issuperset(c.covered)]
    proven = [c for c in inside if (proof := proofs.of(c)) is None or proof.passed]
    return _without_overlap(proven, set())
