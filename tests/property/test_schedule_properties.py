"""Properties of schedules over drawn tables: round trips, derived sources, and files changed at random."""

from __future__ import annotations

import json
from typing import Any, Literal

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from l2c_compile.errors import FileFormatError, ScheduleError
from l2c_compile.schedules.router import Router
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

NAMES = st.sampled_from(["blocks", "attn", "mlp", "0", "1", "12", "in_blocks", "a-b"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(".".join)
KINDS: st.SearchStrategy[Literal["out", "delta"]] = st.sampled_from(["out", "delta"])
CALLS = st.integers(0, 3)
RUNS = st.tuples(PATHS, st.integers(0, 20), st.integers(0, 20), KINDS, CALLS).map(
    lambda parts: Site(f"{parts[0]}.{min(parts[1:3])}", f"{parts[0]}.{max(parts[1:3])}", parts[3], parts[4])
)
SINGLES = st.builds(Site, PATHS, st.none(), KINDS, CALLS)
SITES = SINGLES | RUNS
# Sites that often overlap, so that nesting is met.
NESTED_SITES = st.sampled_from(
    [Site.parse(text) for text in ("b.0..b.3", "b.0..b.1", "b.1..b.2", "delta(b.0..b.3)", "b.0", "b.0.x", "b.2.x", "c")]
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[Site, list[int]], int]:
    """Draw rows whose first evaluation of every branch computes, and the number of branches."""
    branches = draw(st.integers(1, 2))
    num_evaluations = draw(st.integers(branches, 8))
    sites = draw(st.lists(NESTED_SITES, min_size=1, max_size=5, unique=True))
    rest = num_evaluations - branches
    rows = st.lists(st.integers(0, 1), min_size=rest, max_size=rest)
    return {site: [1] * branches + draw(rows) for site in sites}, branches


@st.composite
def schedules(draw: st.DrawFn) -> CacheSchedule:
    """Draw a valid schedule; clashing rows are computed instead."""
    table, branches = draw(tables())
    try:
        return CacheSchedule.from_table(table, branches=branches)
    except ScheduleError:
        site, row = next(iter(table.items()))
        return CacheSchedule.from_table({site: row}, branches=branches)


@given(SITES)
def test_the_text_of_a_site_names_it(site: Site) -> None:
    assert Site.parse(str(site)) == site


@given(SITES, SITES)
def test_covering_is_a_strict_order(one: Site, other: Site) -> None:
    assert not (one.covers(other) and other.covers(one))
    assert not one.covers(one)


@given(schedules())
def test_a_schedule_comes_back_from_its_file(schedule: CacheSchedule) -> None:
    again = CacheSchedule.from_json(schedule.to_json())
    assert again == schedule
    assert dict(again.reuses) == dict(schedule.reuses)
    assert again.to_json() == schedule.to_json()


@given(schedules())
def test_derived_sources_are_the_latest_computed_of_the_branch(schedule: CacheSchedule) -> None:
    for (e, site), entry in schedule.reuses.items():
        covered = any(other.covers(site) and (e, other) in schedule.reuses for other in schedule.sites)
        assert (schedule.active(e, site) is None) == covered
        assert not schedule.computes(e, site)
        if covered:
            assert entry.sources == ()
            continue
        earlier = [s for s in range(e) if s % schedule.branches == e % schedule.branches and schedule.computes(s, site)]
        assert entry.sources == (earlier[-1],)


@given(schedules())
def test_the_counts_agree_with_the_entries(schedule: CacheSchedule) -> None:
    counts = [sum(schedule.computes(e, site) for site in schedule.sites) for e in range(schedule.num_evaluations)]
    assert schedule.computed_per_evaluation() == counts
    assert sum(counts) == round(schedule.computed_share() * len(schedule.sites) * schedule.num_evaluations)
    assert 0.0 <= schedule.removed_share() <= 1.0


@given(tables())
def test_a_table_is_a_schedule_or_a_schedule_error(drawn: tuple[dict[Site, list[int]], int]) -> None:
    table, branches = drawn
    try:
        schedule = CacheSchedule.from_table(table, branches=branches)
    except ScheduleError:
        return
    assert {site: schedule.row(site) for site in schedule.sites} == table


@given(st.integers(1, 6), st.integers(1, 4), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_router_computes_what_its_scores_say(num_evaluations: int, depth: int, threshold: float, seed: int) -> None:
    scores_ES = torch.rand(num_evaluations, depth, generator=torch.Generator().manual_seed(seed))
    sites = tuple(Site(f"blocks.{i}") for i in range(depth))
    router = Router(scores_ES, sites, tuple(range(1, num_evaluations)), threshold)
    schedule = router.schedule()
    for e in range(num_evaluations):
        for column, site in enumerate(sites):
            above = bool(scores_ES[e, column] > threshold)
            assert schedule.computes(e, site) == (e == 0 or above)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**6) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(schedules(), st.data())
def test_a_file_with_one_value_changed_is_read_or_refused(schedule: CacheSchedule, data: st.DataObject) -> None:
    document = json.loads(schedule.to_json())
    key = data.draw(st.sampled_from(sorted(document)))
    if data.draw(st.booleans()) and document[key] and isinstance(document[key], dict):
        inner = data.draw(st.sampled_from(sorted(document[key])))
        document[key][inner] = data.draw(JSON)
    else:
        document[key] = data.draw(JSON)
    read_or_refused(json.dumps(document))


@given(schedules(), st.integers(0, 10**6), st.binary(max_size=4))
def test_a_file_with_bytes_changed_is_read_or_refused(schedule: CacheSchedule, position: int, data: bytes) -> None:
    text = schedule.to_json().encode()
    position %= len(text)
    read_or_refused(text[:position] + data + text[position + 1 :])


@given(st.binary(max_size=64) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b'{"format": "l2c_compile.schedule"}')
@example(b"\xef\xbb\xbf{}")
def test_other_bytes_are_refused(data: bytes) -> None:
    read_or_refused(data)


def read_or_refused(text: str | bytes) -> None:
    """Any other error than a FileFormatError fails the test."""
    try:
        schedule = CacheSchedule.from_json(text)
    except FileFormatError:
        return
    assert CacheSchedule.from_json(schedule.to_json()) == schedule
