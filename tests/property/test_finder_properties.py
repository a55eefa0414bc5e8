"""Properties of finders over drawn profiles: schedules are valid, follow their parameter and meet their budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st

from l2c_compile.finders import Profile, Work, alternate_evaluations, for_budget
from l2c_compile.methods import (
    block_caching,
    invar_diff,
    mag_cache,
    pairwise,
    random_reuse,
    smooth_cache,
    uniform_interval,
)
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

WHOLE = Site.parse("blocks.0..blocks.1")
CHANGE = Site.parse("delta(blocks.0..blocks.1)")
PARTS = tuple(Site.parse(f"blocks.{i}.{name}") for i in range(2) for name in ("attn", "mlp"))

Select = Callable[[Profile, float], CacheSchedule]
SELECTORS: dict[str, Select] = {
    "smooth_cache": lambda profile, x: smooth_cache(profile, x, lookahead=2),
    "smooth_cache by site": lambda profile, x: smooth_cache(profile, x, lookahead=2, by="site"),
    "block_caching": block_caching,
    "invar_diff": lambda profile, x: invar_diff(profile, min(x, 1.0)),
    "invar_diff whole": lambda profile, x: invar_diff(profile, min(x, 1.0) / 2, min(x, 1.0)),
    "mag_cache": mag_cache,
    "mag_cache parts": lambda profile, x: mag_cache(profile, x, max_skip=2, retention=0.0, sites=PARTS),
}
ERRORS = st.sampled_from(["smooth-cache", "block-caching", "invar-diff", "mag-cache"])
BUDGETS = st.floats(0.05, 1.0)
SHARES = st.floats(0.0, 1.0)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Draw a profile of two runs whose statistics are independent of each other; some of them zero."""
    branches = draw(st.integers(1, 2))
    count = branches * draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    sites = (CHANGE, WHOLE, *PARTS)

    def numbers(*shape: int) -> torch.Tensor:
        values = torch.rand(*shape, count, len(sites), generator=generator)
        return values * (torch.rand(values.shape, generator=generator) > 0.1)

    prices = {site: tuple(torch.randint(1, 50, (count,), generator=generator).tolist()) for site in PARTS}
    whole = tuple(map(sum, zip(*prices.values(), strict=True)))
    work = Work(tuple(price + 7 for price in whole), {**prices, WHOLE: whole, CHANGE: whole})
    # As many lags as there are evaluations: no selector asks for more.
    return Profile(numbers(2, count), 0.1 + numbers(2), 0.5 + numbers(2), work, sites, branches)


@given(profiles(), st.sampled_from(sorted(SELECTORS)), SHARES)
def test_every_selector_computes_the_first_evaluation_of_each_branch(profile: Profile, name: str, x: float) -> None:
    schedule = SELECTORS[name](profile, x)
    assert schedule.num_evaluations == profile.num_evaluations
    assert schedule.branches == profile.branches
    assert all(schedule.computes(e, site) for e in range(profile.branches) for site in schedule.sites)
    assert all(
        (e - source) % profile.branches == 0 for (e, _), entry in schedule.reuses.items() for source in entry.sources
    )


@given(profiles(), st.sampled_from(sorted(SELECTORS)))
def test_at_zero_nothing_that_changes_is_reused(profile: Profile, name: str) -> None:
    change, growth = profile.change.clamp_min(0.1), profile.growth.clamp_min(1.1)
    changing = Profile(change, profile.size, growth, profile.work, profile.sites, profile.branches)
    assert SELECTORS[name](changing, 0.0).reuses == {}


@given(profiles(), SHARES, SHARES)
def test_block_caching_keeps_less_the_more_change_it_allows(profile: Profile, x: float, y: float) -> None:
    kept = [profile.work.kept(block_caching(profile, 3 * delta)) for delta in sorted((x, y))]
    assert kept[0] >= kept[1]


@given(profiles(), SHARES, SHARES)
def test_the_first_pass_of_invar_diff_reuses_more_at_a_higher_quantile(profile: Profile, x: float, y: float) -> None:
    few, many = (invar_diff(profile, quantile, corrected=False) for quantile in sorted((x, y)))
    assert few.reuses.keys() <= many.reuses.keys()


@given(profiles(), ERRORS, BUDGETS, BUDGETS)
def test_pairs_are_filled_up_to_the_budget_in_one_order(profile: Profile, error: str, x: float, y: float) -> None:
    more, less = (pairwise(profile, error, budget) for budget in sorted((x, y)))  # type: ignore[arg-type]
    assert less.reuses.keys() <= more.reuses.keys()
    among = alternate_evaluations(profile.num_evaluations, branches=profile.branches)
    check_filled(more, profile.work, min(x, y), among)
    assert all(entry.sources == (e - profile.branches,) for (e, _), entry in more.reuses.items())


@given(profiles(), BUDGETS, st.integers(0, 100), st.booleans())
def test_a_random_schedule_meets_its_budget_within_one_entry(
    profile: Profile, budget: float, seed: int, in_pairs: bool
) -> None:
    count, branches, work = profile.num_evaluations, profile.branches, profile.work
    among = alternate_evaluations(count, branches=branches) if in_pairs else list(range(branches, count))
    schedule = random_reuse(count, PARTS, budget, seed=seed, among=among, work=work, branches=branches)
    check_filled(schedule, work, budget, among)
    by_entries = random_reuse(count, PARTS, budget, seed=seed, among=among, branches=branches)
    cells = count * len(PARTS)
    # Half an entry, for shares that are no binary numbers.
    assert len(by_entries.reuses) == min(len(among) * len(PARTS), int((1 - budget) * cells + 1e-9))


@given(profiles(), st.sampled_from(sorted(SELECTORS)), BUDGETS)
def test_a_search_keeps_no_less_than_its_budget(profile: Profile, name: str, budget: float) -> None:
    select = SELECTORS[name]
    found = for_budget(lambda x: select(profile, x), profile.work, budget, highest=None if "invar" not in name else 1.0)
    nothing = profile.work.kept(select(profile, 0.0))
    assert found.kept >= min(budget, nothing)
    assert found.schedule == select(profile, found.parameter)


@given(profiles(), BUDGETS)
def test_a_search_over_a_monotone_selector_finds_the_best(profile: Profile, budget: float) -> None:
    found = for_budget(lambda delta: block_caching(profile, delta), profile.work, budget)
    beyond = profile.work.kept(block_caching(profile, found.parameter * (1 + 1e-9) + 1e-9))
    assert beyond == found.kept or beyond < budget


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 3))
def test_both_anchors_of_an_interval_compute_the_first(count: int, interval: int, branches: int) -> None:
    for anchor in ("start", "end"):
        row = uniform_interval(count * branches, ["a"], interval, anchor=anchor, branches=branches).row("a")
        computed = [n for n in range(count) if row[n * branches]]
        assert all(row[n * branches : (n + 1) * branches] == [row[n * branches]] * branches for n in range(count))
        assert computed[0] == 0
        gaps = [b - a for a, b in itertools.pairwise(computed)]
        assert all(gap == interval for gap in (gaps[1:] if anchor == "end" else gaps))
        assert anchor == "start" or computed[-1] == count - 1


def check_filled(schedule: CacheSchedule, work: Work, budget: float, among: list[int]) -> None:
    """Check that the budget is kept, and that one more entry of those allowed would have broken it."""
    kept = work.kept(schedule) * work.total
    assert kept >= budget * work.total - 0.5 - 1e-6
    num_allowed = len(among) * len(schedule.sites)
    if schedule.info["method"] == "smallest error of invar-diff in pairs":
        num_allowed -= schedule.branches * len(schedule.sites) * (max(among) == schedule.num_evaluations - 1)
    dearest = max(max(work.sites[site]) for site in schedule.sites)
    assert len(schedule.reuses) == num_allowed or kept - dearest < budget * work.total
