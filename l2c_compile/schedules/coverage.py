"""Which sites cover which, so that a reuse makes them superfluous, and where each reuse takes its value from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from l2c_compile.errors import ScheduleError
from l2c_compile.schedules.rules import Rule
from l2c_compile.schedules.sites import Site

_MAX_SHARED_WORK = 1_000_000

COMPUTED, REUSED, HIDDEN = 0, 1, 2


def entry_states(num_evaluations: int, sites: Sequence[Site], reused: Iterable[tuple[int, Site]]) -> dict[Site, bytes]:
    """Return for each site its state at every evaluation: computed, reused or hidden.

    Raises:
        ScheduleError: if two sites that overlap without nesting are reused in the same evaluation.
    """
    rows = {site: bytearray(num_evaluations) for site in sites}
    for e, site in reused:
        rows[site][e] = REUSED
    pairs = _overlapping_pairs(sites, num_evaluations)
    # Whether a whole is reused does not depend on states: if it is hidden itself, the site that hides it also hides its
    # parts.
    whole_rows = {whole: bytes(rows[whole]) for whole, _, nested in pairs if nested}
    for whole, part, nested in pairs:
        if nested:
            for e in _positions(whole_rows[whole]):
                rows[part][e] = HIDDEN
    hidden: list[tuple[Site, int]] = []
    for one, other, nested in pairs:
        if nested:
            continue
        for e in range(num_evaluations):
            if rows[one][e] == rows[other][e] == REUSED:
                raise ScheduleError(
                    f"sites {one} and {other} overlap, neither contains the other, and both are reused at "
                    f"evaluation {e}; compute one of them at {e}"
                )
            if REUSED in (rows[one][e], rows[other][e]):
                # The shared modules do not run, so the other cut has no value of its own either.
                hidden.append((other if rows[one][e] == REUSED else one, e))
    for site, e in hidden:
        rows[site][e] = HIDDEN
    return {site: bytes(row) for site, row in rows.items()}


def covering_sites(sites: Sequence[Site]) -> dict[Site, tuple[Site, ...]]:
    """Return for each site the sites that cover it: where one of them is reused, the site is hidden.

    Raises:
        ScheduleError: if two sites share work and neither covers the other.
    """
    covering: dict[Site, list[Site]] = {site: [] for site in sites}
    for whole, part, nested in _overlapping_pairs(sites, 1):
        if not nested:
            raise ScheduleError(f"sites {whole} and {part} overlap and neither contains the other; leave one out")
        covering[part].append(whole)
    return {site: tuple(dict.fromkeys(wholes)) for site, wholes in covering.items()}


def _overlapping_pairs(sites: Sequence[Site], num_evaluations: int) -> list[tuple[Site, Site, bool]]:
    """Return (whole, part, True) for nested sites and (one, other, False) for sites that overlap otherwise.

    Most schedules have no such pairs, so sites are looked up by module instead of compared with each other.
    """
    by_module: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        for module in site.modules():
            by_module[module].append(site)
    if sum(len(sharing) ** 2 for sharing in by_module.values()) > _MAX_SHARED_WORK:
        raise ScheduleError(
            "the sites of the schedule overlap too much; leave out runs that share most of their modules"
        )
    position = {site: index for index, site in enumerate(sites)}
    pairs: list[tuple[Site, Site, bool]] = []
    for site in sites:
        # A dict keeps the order of the sites, so that messages do not depend on hashing.
        above: dict[Site, None] = {}
        path = site.path.rpartition(".")[0]
        while path:
            above.update(dict.fromkeys(by_module.get(path, ())))
            path = path.rpartition(".")[0]
        beside: dict[Site, None] = {}
        for module in site.modules():
            if len(by_module[module]) > 1:
                beside.update(dict.fromkeys(by_module[module]))
        pairs.extend((whole, site, True) for whole in above)
        for other in beside:
            if other == site or other.call != site.call:
                continue
            if other.covers(site):
                pairs.append((other, site, True))
            elif not site.covers(other) and position[site] < position[other]:
                pairs.append((site, other, False))
        if len(pairs) * num_evaluations > _MAX_SHARED_WORK * 10:
            raise ScheduleError("too many sites of the schedule contain one another for its number of evaluations")
    return pairs


def derive_sources(states: bytes, rules: Mapping[int, Rule], branches: int) -> dict[int, tuple[int, ...]]:
    """Return for each reused evaluation of one site its latest sources, newest first, where there are enough."""
    computed: list[list[int]] = [[] for _ in range(branches)]
    any_origin: list[list[int]] = [[] for _ in range(branches)]
    derived: dict[int, tuple[int, ...]] = {}
    for e, state in enumerate(states):
        branch = e % branches
        if state == HIDDEN and e in rules:
            derived[e] = ()
        elif state == REUSED:
            rule = rules[e]
            past = any_origin[branch] if rule.history == "held" else computed[branch]
            if len(past) >= rule.num_sources:
                derived[e] = tuple(past[: -rule.num_sources - 1 : -1])
        if state == COMPUTED:
            computed[branch].append(e)
        if state != HIDDEN:
            any_origin[branch].append(e)
    return derived


def _positions(row: bytes) -> list[int]:
    return [e for e, state in enumerate(row) if state == REUSED]
