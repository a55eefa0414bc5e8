"""Schedules, which say which evaluation computes a site, which reuses it, and from where.

A schedule is made, checked, priced, saved and compared here without a model and without torch. Rows are always in
execution order: evaluation 0 is the first call of the denoiser, on pure noise.

At evaluation ``e`` a site is in one of three states. A *computed* site runs, and later evaluations may read it. For a
*reused* site, a rule makes its value from the values at its sources. A *hidden* site is covered by a reused one, so
that it neither runs nor has a value; a reuse of it there is inactive (as in InvarDiff, arXiv 2512.05134, where the
whole stack covers its sublayers).
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from l2c_compile.errors import FileFormatError, ScheduleError, UnknownSiteError, nearest
from l2c_compile.files.documents import (
    MAX_JSON_BYTES,
    check_header,
    frozen_json,
    honoured,
    parse_json,
    plain_json,
    read_bytes,
    write_atomically,
)
from l2c_compile.schedules.coverage import COMPUTED, HIDDEN, REUSED, derive_sources, entry_states
from l2c_compile.schedules.rules import HOLD, Rule, rule_from_dict
from l2c_compile.schedules.sites import Site, as_site, expand_patterns, nearest_module

FORMAT = "l2c_compile.schedule"
VERSION = 1
_KEYS = frozenset({"format", "version", "orientation", "num_evaluations", "sites"})
_OPTIONAL_KEYS = frozenset({"branches", "cacheable", "loop", "info", "rules", "sources"})

MAX_EVALUATIONS = 100_000
MAX_CELLS = 2_000_000
"""The most evaluations x sites of one schedule, which limits the memory that a hostile file can make us allocate."""
# This is 1000 evaluations x 100 sites, more than any sampler has. Checking so many takes a second.
_MAX_REUSES = 100_000
_MAX_MODULES = 200_000


@dataclass(frozen=True)
class Reuse:
    """One entry of a schedule: the site is not computed, but ``rule`` makes its value."""

    sources: tuple[int, ...]
    """The evaluations that are read, newest first, as many as the rule wants; an inactive entry may have none."""
    rule: Rule = HOLD
    """The rule that makes the value from those at the sources."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))


@dataclass(frozen=True, eq=False)
class CacheSchedule:
    """An immutable table evaluation x site, whose entries are all checked.

    Two schedules are equal if they have the same ``digest``: everything but ``info`` counts.

    Raises:
        ScheduleError: if an entry could not take effect. The message names the site, the evaluation and the way out.
    """

    num_evaluations: int
    """The number of times that the loop calls the denoiser."""
    sites: tuple[Site, ...]
    """The columns of the table. A site with a ``*`` is a pattern until ``resolve``."""
    reuses: Mapping[tuple[int, Site], Reuse]
    """The entries that are not computed, by (evaluation, site), read-only."""
    cacheable: frozenset[int] = frozenset()
    """The evaluations in which the method that made the schedule may reuse; if empty, those with a reuse."""
    branches: int = 1
    """Number of branches, 2 for guidance in two separate calls; evaluations e with equal ``e % branches`` share
    caches."""
    loop: Mapping[str, object] | None = None
    """The JSON description of the loop that the schedule was made for, read-only."""
    info: Mapping[str, object] = field(default_factory=dict)
    """Information on where the schedule comes from, read-only; it has no part in ``digest``."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "sites", tuple(self.sites))
        set_field(self, "reuses", MappingProxyType(dict(self.reuses)))
        set_field(self, "cacheable", frozenset(self.cacheable) or frozenset(e for e, _ in self.reuses))
        set_field(self, "loop", None if self.loop is None else frozen_json(self.loop, "loop"))
        set_field(self, "info", frozen_json(self.info, "info"))
        _check_shape(self)
        _check_entries(self)

    @classmethod
    def all_compute(cls, num_evaluations: int, sites: Iterable[Site | str] = ()) -> CacheSchedule:
        """Return the schedule that reuses nothing, under which a model computes what it does without caching."""
        return cls(num_evaluations, tuple(map(as_site, sites)), {})

    @classmethod
    def from_table(
        cls,
        table: Mapping[Site, Sequence[int]] | Mapping[str, Sequence[int]] | Mapping[Site | str, Sequence[int]],
        *,
        branches: int = 1,
        rule: Rule = HOLD,
        cacheable: Iterable[int] | None = None,
        loop: Mapping[str, object] | None = None,
        info: Mapping[str, object] | None = None,
    ) -> CacheSchedule:
        """Return the schedule for rows of 1 (compute) and 0 (reuse), one row for each site, in execution order.

        The source of a reuse is the latest evaluation before it, of the same branch, in which the site is computed; a
        rule with n sources gets the latest n.

        Raises:
            ScheduleError: if rows differ in length, an entry is neither 0 nor 1, or a reuse has nothing to read.
        """
        rows: dict[Site, list[bool]] = {}
        for key, row in table.items():
            site = as_site(key)
            if site in rows:
                raise ScheduleError(f"site {site} has two rows")
            rows[site] = [_entry(site, e, value) for e, value in enumerate(row)]
        if not rows:
            raise ScheduleError("a table wants at least one row; all_compute() makes a schedule without sites")
        reused = {site: {e: rule for e, computed in enumerate(row) if not computed} for site, row in rows.items()}
        num_evaluations = _common_length(rows)
        return cls._derived(
            num_evaluations, reused, {}, frozenset(cacheable or ()), branches, loop, info if info is not None else {}
        )

    @classmethod
    def _derived(
        cls,
        num_evaluations: int,
        reused: Mapping[Site, Mapping[int, Rule]],
        given: Mapping[tuple[int, Site], tuple[int, ...]],
        cacheable: frozenset[int],
        branches: int,
        loop: Mapping[str, object] | None,
        info: Mapping[str, object],
    ) -> CacheSchedule:
        """Return a schedule whose sources are derived where they are not given."""
        sites = tuple(reused)
        _check_counts(num_evaluations, sites, branches)
        _check_num_reuses(sum(map(len, reused.values())))
        states = entry_states(num_evaluations, sites, ((e, site) for site in sites for e in reused[site]))
        reuses = {}
        for site in sites:
            derived = derive_sources(states[site], reused[site], branches)
            for e, rule in reused[site].items():
                sources = given.get((e, site), derived.get(e))
                if sources is None:
                    raise ScheduleError(
                        f"site {site} is reused at evaluation {e}, but the evaluations before it"
                        f"{'' if branches == 1 else f' of branch {e % branches}'} hold fewer than {rule.num_sources} "
                        f"value(s) for rule {rule.name!r} to read; compute the site earlier, or compute it at {e}"
                    )
                reuses[e, site] = Reuse(sources, rule)
        return cls(num_evaluations, sites, reuses, cacheable, branches, loop, info)

    def reuse(self, e: int, site: Site | str) -> Reuse | None:
        """Return the entry at (e, site), active or not; None if the table says compute."""
        self._state(e, site)
        return self.reuses.get((e, as_site(site)))

    def active(self, e: int, site: Site | str) -> Reuse | None:
        """Return the entry at (e, site) if it takes effect: None where the site is computed or hidden."""
        return self.reuses[e, as_site(site)] if self._state(e, site) == REUSED else None

    def computes(self, e: int, site: Site | str) -> bool:
        """Return whether the site really runs at ``e``: neither it nor a site that covers it is reused there."""
        return self._state(e, site) == COMPUTED

    def row(self, site: Site | str) -> list[int]:
        """Return the row of a site: 1 where the entry says compute, 0 where it says reuse, active or not."""
        site = self._known(site)
        return [int((e, site) not in self.reuses) for e in range(self.num_evaluations)]

    def resolve(self, module_paths: Iterable[str]) -> CacheSchedule:
        """Return the schedule with every pattern replaced by the modules it stands for.

        A path gets the entries of the most specific key that names it: the path itself, else the pattern with the
        fewest ``*``, else the one with the most other characters. Sources that were derived are derived again, because
        only now it shows which sites cover a pattern.

        Args:
            module_paths: the paths of all modules of the denoiser, as in ``nn.Module.named_modules``.

        Raises:
            UnknownSiteError: if a site names no module or a pattern stands for none.
            ScheduleError: if two patterns name a path and neither is more specific.
        """
        paths = list(dict.fromkeys(module_paths))
        known = set(paths)
        for site in self.sites:
            missing = next((path for path in site.modules() if not site.is_pattern and path not in known), None)
            if missing is not None:
                spelled = str(site) if str(site) in known else missing
                raise UnknownSiteError(
                    f"site {site}: the denoiser has no module {missing!r}. {nearest_module(spelled, known)}"
                )
        if not any(site.is_pattern for site in self.sites):
            return self
        origin = expand_patterns(self.sites, paths)
        position = {path: index for index, path in enumerate(paths)}
        order = sorted(origin, key=lambda site: (position[site.path], site))
        defaults = self._default_sources
        reused = {
            site: {
                e: self.reuses[e, origin[site]].rule
                for e in range(self.num_evaluations)
                if (e, origin[site]) in self.reuses
            }
            for site in order
        }
        given = {
            (e, site): sources
            for site in order
            for e in reused[site]
            if (sources := self.reuses[e, origin[site]].sources) != defaults.get((e, origin[site]))
        }
        return self._derived(self.num_evaluations, reused, given, self.cacheable, self.branches, self.loop, self.info)

    def computed_share(self) -> float:
        """Return the share of (evaluation, site) that is computed; 1.0 without sites."""
        cells = self.num_evaluations * len(self.sites)
        return sum(self.computed_per_evaluation()) / cells if cells else 1.0

    def computed_per_evaluation(self) -> list[int]:
        """Return the number of computed sites of each evaluation."""
        states = [self._states[site] for site in self.sites]
        if not states:
            return [0] * self.num_evaluations
        return [column.count(COMPUTED) for column in zip(*states, strict=True)]

    def computed_share_per_site(self) -> dict[Site, float]:
        """Return for each site the share of evaluations that compute it."""
        return {site: self._states[site].count(COMPUTED) / self.num_evaluations for site in self.sites}

    def computed_in_cacheable(self) -> tuple[int, int]:
        """Return how many of the entries in cacheable evaluations are computed, and how many entries there are."""
        computed = self.computed_per_evaluation()
        return sum(computed[e] for e in self.cacheable), len(self.cacheable) * len(self.sites)

    def removed_share(self) -> float:
        """Return the share of the entries in cacheable evaluations that is not computed (L2C, table 4); 0.0 if none."""
        computed, total = self.computed_in_cacheable()
        return (total - computed) / total if total else 0.0

    @cached_property
    def digest(self) -> str:
        """The sha256 of the canonical JSON of everything but ``info``, which is equal for equal behaviour."""
        document = self._document()
        del document["info"]
        # The order of the columns counts, but the order of keys elsewhere does not.
        document["sites"] = list(map(str, self.sites)), document["sites"]
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, CacheSchedule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"CacheSchedule({self.num_evaluations} evaluations x {len(self.sites)} sites, "
            f"{self.computed_share():.1%} computed, digest {self.digest[:12]})"
        )

    def __deepcopy__(self, memo: dict[int, object]) -> CacheSchedule:
        return self

    def __reduce__(self) -> tuple[Callable[[str], CacheSchedule], tuple[str]]:
        return CacheSchedule.from_json, (self.to_json(),)

    def to_json(self) -> str:
        """Return the JSON form, a line for each site; derived sources and the rule ``hold`` are left out."""
        document = self._document()
        rows = document.pop("sites")
        assert isinstance(rows, dict)
        lines = [f"  {_compact(key)}: {_compact(value)},\n" for key, value in document.items()]
        row_lines = ",\n".join(f"    {_compact(site)}: {_compact(row)}" for site, row in rows.items())
        return "{\n" + "".join(lines) + '  "sites": {\n' + row_lines + "\n  }\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> CacheSchedule:
        """Read the JSON form.

        Raises:
            FileFormatError: if the text is not of this form, is of a newer version, or describes a schedule that cannot
                be honoured.
        """
        document = parse_json(text)
        check_header(document, "schedule", FORMAT, VERSION, _KEYS, _OPTIONAL_KEYS)
        with honoured("schedule"):
            return cls._from_document(document)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form, at once or not at all."""
        write_atomically(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CacheSchedule:
        """Read a file that ``save`` wrote.

        Raises:
            FileFormatError: if ``from_json`` refuses the content.
            OSError: if the file cannot be read.
        """
        return cls.from_json(read_bytes(path, max_bytes=MAX_JSON_BYTES))

    def _document(self) -> dict[str, object]:
        sources: dict[str, dict[str, list[int]]] = defaultdict(dict)
        rules: dict[str, tuple[Rule, dict[str, list[int]]]] = {}
        defaults = self._default_sources
        for (e, site), entry in sorted(self.reuses.items(), key=operator.itemgetter(0)):
            if entry.sources != defaults.get((e, site)):
                sources[str(site)][str(e)] = list(entry.sources)
            if entry.rule != HOLD:
                key = json.dumps(entry.rule.to_dict(), sort_keys=True)
                rules.setdefault(key, (entry.rule, {}))[1].setdefault(str(site), []).append(e)
        return {
            "format": FORMAT,
            "version": VERSION,
            "orientation": "execution",
            "num_evaluations": self.num_evaluations,
            "branches": self.branches,
            "cacheable": sorted(self.cacheable),
            "loop": plain_json(self.loop),
            "info": plain_json(self.info),
            "rules": [{"rule": rule.to_dict(), "entries": entries} for rule, entries in rules.values()],
            "sources": dict(sources),
            "sites": {str(site): self.row(site) for site in self.sites},
        }

    @classmethod
    def _from_document(cls, document: Mapping[str, object]) -> CacheSchedule:
        num_evaluations = _count(document["num_evaluations"], "num_evaluations")
        rows = {
            Site.parse(key): _list(row, f"row {key:.80}") for key, row in _object(document["sites"], "sites").items()
        }
        if len(rows) != len(_object(document["sites"], "sites")):
            raise FileFormatError("the schedule has one site in two spellings")
        for site, row in rows.items():
            if len(row) != num_evaluations:
                raise FileFormatError(f"site {site} wants {num_evaluations} entries, has {len(row)}")
        reused: dict[Site, dict[int, Rule]] = {
            site: {e: HOLD for e, value in enumerate(row) if not _entry(site, e, value)} for site, row in rows.items()
        }
        for group in _list(document.get("rules", []), "rules"):
            fields = _object(group, "an item of rules")
            rule = rule_from_dict(_object(fields.get("rule"), "rule"))
            for key, evaluations in _object(fields.get("entries"), "entries").items():
                for e in _list(evaluations, f"entries of {key:.80}"):
                    _reused_row(reused, key, e)[_count(e, "an evaluation")] = rule
        given: dict[tuple[int, Site], tuple[int, ...]] = {}
        for key, entries in _object(document.get("sources", {}), "sources").items():
            for text, sources in _object(entries, f"sources of {key:.80}").items():
                e = _index(text)
                _reused_row(reused, key, e)
                given[e, Site.parse(key)] = tuple(_count(source, "a source") for source in _list(sources, "sources"))
        cacheable = frozenset(_count(e, "cacheable") for e in _list(document.get("cacheable", []), "cacheable"))
        loop, info = document.get("loop"), document.get("info", {})
        return cls._derived(
            num_evaluations,
            reused,
            given,
            cacheable,
            _count(document.get("branches", 1), "branches"),
            None if loop is None else _object(loop, "loop"),
            _object(info, "info"),
        )

    @cached_property
    def _states(self) -> Mapping[Site, bytes]:
        return entry_states(self.num_evaluations, self.sites, self.reuses.keys())

    @cached_property
    def _default_sources(self) -> dict[tuple[int, Site], tuple[int, ...]]:
        """The sources that would be derived, for each entry where there are enough."""
        rules: dict[Site, dict[int, Rule]] = {site: {} for site in self.sites}
        for (e, site), entry in self.reuses.items():
            rules[site][e] = entry.rule
        return {
            (e, site): sources
            for site in self.sites
            for e, sources in derive_sources(self._states[site], rules[site], self.branches).items()
        }

    def _known(self, site: Site | str) -> Site:
        site = as_site(site)
        if site not in self._states:
            raise UnknownSiteError(f"the schedule has no site {site}. {nearest(str(site), map(str, self.sites))}")
        return site

    def _state(self, e: int, site: Site | str) -> int:
        row = self._states[self._known(site)]
        if not 0 <= e < self.num_evaluations:
            raise ScheduleError(f"the schedule has evaluations 0..{self.num_evaluations - 1}, got {e}")
        return row[e]


def _check_shape(schedule: CacheSchedule) -> None:
    """Check the counts, the sites, and that every entry lies in the table."""
    num_evaluations, sites = schedule.num_evaluations, schedule.sites
    _check_counts(num_evaluations, sites, schedule.branches)
    _check_num_reuses(len(schedule.reuses))
    known = set(sites)
    for (e, site), entry in schedule.reuses.items():
        if site not in known:
            raise ScheduleError(f"site {site} is reused at evaluation {e!r} but is not among the sites of the schedule")
        if type(e) is not int or not 0 <= e < num_evaluations:
            raise ScheduleError(f"site {site} is reused at evaluation {e!r}; the schedule has 0..{num_evaluations - 1}")
        if not isinstance(entry, Reuse):
            raise ScheduleError(f"site {site} at evaluation {e} wants a Reuse, got {type(entry).__name__}")
        if e not in schedule.cacheable:
            raise ScheduleError(
                f"site {site} is reused at evaluation {e}, which is not cacheable; add {e} to cacheable, or compute it"
            )
    for e in schedule.cacheable:
        if type(e) is not int or not 0 <= e < num_evaluations:
            raise ScheduleError(f"cacheable names evaluation {e!r}; the schedule has 0..{num_evaluations - 1}")


def _check_counts(num_evaluations: int, sites: Sequence[Site], branches: int) -> None:
    if type(num_evaluations) is not int or not 1 <= num_evaluations <= MAX_EVALUATIONS:
        raise ScheduleError(f"a schedule wants 1 to {MAX_EVALUATIONS} evaluations, got {num_evaluations!r}")
    if type(branches) is not int or not 1 <= branches <= num_evaluations:
        raise ScheduleError(f"branches wants a number from 1 to {num_evaluations} (the evaluations), got {branches!r}")
    if num_evaluations * len(sites) > MAX_CELLS:
        raise ScheduleError(f"{num_evaluations} evaluations x {len(sites)} sites are more than {MAX_CELLS} entries")
    if len(set(sites)) != len(sites):
        raise ScheduleError("a site occurs twice among the sites of the schedule")
    if sum(site.num_modules for site in sites) > _MAX_MODULES:
        raise ScheduleError(f"the runs among the sites name more than {_MAX_MODULES} modules")


def _check_num_reuses(num_reuses: int) -> None:
    if num_reuses > _MAX_REUSES:
        raise ScheduleError(
            f"a schedule wants at most {_MAX_REUSES} reused entries, got {num_reuses}; name a run or a module for all"
            " that is reused together"
        )


def _check_entries(schedule: CacheSchedule) -> None:
    """Check that every active reuse can be made from what its sources hold."""
    for (e, site), entry in schedule.reuses.items():
        here = f"site {site} is reused at evaluation {e}"
        row = schedule._states[site]
        inactive = row[e] == HIDDEN
        if len(entry.sources) != entry.rule.num_sources and not (inactive and not entry.sources):
            raise ScheduleError(
                f"{here} with rule {entry.rule.name!r}, which wants {entry.rule.num_sources} source(s), "
                f"got {len(entry.sources)}; name as many sources, or use another rule"
            )
        for source in entry.sources:
            if type(source) is not int or not 0 <= source < e:
                raise ScheduleError(
                    f"{here} from source {source!r}; a source is an earlier evaluation: compute it at {e}"
                )
            has_value = row[source] == COMPUTED or (entry.rule.history == "held" and row[source] == REUSED)
            if not inactive and not has_value:
                reason = "it is reused itself" if row[source] == REUSED else "a site that shares its work is reused"
                computed = [earlier for earlier in range(e) if row[earlier] == COMPUTED]
                way_out = f"the latest that computes it is {computed[-1]}" if computed else "none before it computes it"
                raise ScheduleError(
                    f"{here} from source {source}, where {reason}; {way_out}, or compute it at {source}"
                )


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _entry(site: Site, e: int, value: object) -> bool:
    """Return whether a table entry says compute."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number not in (0, 1):
        raise ScheduleError(f"site {site} at evaluation {e} wants 1 (compute) or 0 (reuse), got {value!r:.80}")
    return number == 1


def _common_length(rows: Mapping[Site, Sequence[object]]) -> int:
    first, *others = rows
    for site in others:
        if len(rows[site]) != len(rows[first]):
            raise ScheduleError(
                f"rows want the same length, one entry an evaluation: {first} has {len(rows[first])}, {site} has "
                f"{len(rows[site])}"
            )
    return len(rows[first])


def _count(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_EVALUATIONS:
        raise FileFormatError(f"{what} wants a number from 0 to {MAX_EVALUATIONS}, got {value!r:.80}")
    return value


def _index(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and str(int(text)) == text):
        raise FileFormatError(f"sources wants evaluations as keys, got {text!r:.80}")
    return int(text)


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        raise FileFormatError(f"{what} wants a list, got {type(value).__name__}")
    return value


def _object(value: object, what: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise FileFormatError(f"{what} wants an object, got {type(value).__name__}")
    return value


def _reused_row(reused: dict[Site, dict[int, Rule]], key: str, e: object) -> dict[int, Rule]:
    """Return the reused entries of a site of the file, after checking that evaluation ``e`` is one of them."""
    site = Site.parse(key)
    if site not in reused or e not in reused[site]:
        raise FileFormatError(
            f"sources or rules name site {key:.80} at evaluation {e!r:.80}, which the table does not reuse"
        )
    return reused[site]
