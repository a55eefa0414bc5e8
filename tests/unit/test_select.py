"""Selectors against schedules worked out by hand, and against what their authors' code gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l2c_compile.errors import ProfileError, ScheduleError, UnknownSiteError
from l2c_compile.finders import for_budget
from l2c_compile.finders.profile import Profile
from l2c_compile.finders.work import Work
from l2c_compile.methods import block_caching, invar_diff, mag_cache, pairwise, smooth_cache
from l2c_compile.methods.mag_cache import mag_cache_row
from l2c_compile.schedules.sites import Site


def profile_of(
    values: Tensor, sites: tuple[str, ...] = ("blocks.0.attn",), *, lags: int = 3, branches: int = 1
) -> Profile:
    """Return the profile of sites that hold one number each: values (R, E, S)."""
    values = values.float()
    num_runs, num_evaluations, num_sites = values.shape
    change = torch.zeros(num_runs, lags, num_evaluations, num_sites)
    for k in range(1, lags + 1):
        lag = k * branches
        change[:, k - 1, lag:] = (values[:, lag:] - values[:, :-lag]).abs() if lag < num_evaluations else 0
    growth = torch.ones_like(values)
    growth[:, branches:] = values[:, branches:].abs() / values[:, :-branches].abs().clamp_min(1e-8)
    parsed = tuple(map(Site.parse, sites))
    work = Work((100,) * num_evaluations, dict.fromkeys(parsed, (90 // num_sites,) * num_evaluations))
    return Profile(change, values.abs(), growth, work, parsed, branches)


def one_site(*values: float, lags: int = 3) -> Profile:
    return profile_of(torch.tensor(values)[None, :, None], lags=lags)


def test_smooth_cache_jumps_as_far_as_the_error_allows() -> None:
    # Errors over the later value: lag 1 is 1/2, 0, 1/3, 1/2, 0, 0; lag 2 is 1/2, 1/3, 2/3, 1/2, 0.
    profile = one_site(1, 2, 2, 3, 6, 6, 6)
    row = smooth_cache(profile, 0.34, lookahead=2).row("blocks.0.attn")
    # From 0: neither lag. From 1: lag 2 at 1/3, so 2 and 3 are reused. From 4: lag 2 at 0; the last is forced.
    assert row == [1, 1, 0, 0, 1, 0, 1]


def test_smooth_cache_does_not_look_at_smaller_jumps() -> None:
    # From 0 the value returns at lag 2 after having been far away at lag 1.
    assert smooth_cache(one_site(1, 5, 1, 9, 2), 0.1).row("blocks.0.attn") == [1, 0, 0, 1, 1]


def test_smooth_cache_shares_a_row_by_type_and_not_by_site() -> None:
    values = torch.tensor([[1.0, 1, 1], [1, 2, 1], [1, 2, 1], [1, 1, 1]])[None]
    profile = profile_of(values, ("blocks.0.attn", "blocks.1.attn", "blocks.0.mlp"), lags=1)
    # The mean error of the two attentions from 0 to 1 is (0 + 1/2) / 2, from 1 to 2 it is 0.
    shared = smooth_cache(profile, 0.2, lookahead=1)
    assert shared.row("blocks.0.attn") == shared.row("blocks.1.attn") == [1, 1, 0, 1]
    assert shared.row("blocks.0.mlp") == [1, 0, 1, 1]
    by_site = smooth_cache(profile, 0.2, lookahead=1, by="site")
    assert by_site.row("blocks.0.attn") == [1, 0, 1, 1]
    assert by_site.row("blocks.1.attn") == [1, 1, 0, 1]


def test_smooth_cache_sums_norms_over_runs_before_it_divides() -> None:
    # 1 -> 2 and 100 -> 100: 1 / 102, not the mean of 1/2 and 0.
    profile = profile_of(torch.tensor([[[1.0], [2], [2]], [[100], [100], [100]]]), lags=1)
    assert smooth_cache(profile, 1 / 101, lookahead=1).row("blocks.0.attn") == [1, 0, 1]
    assert smooth_cache(profile, 1 / 103, lookahead=1).row("blocks.0.attn") == [1, 1, 1]


def test_block_caching_adds_up_changes_over_the_earlier_value() -> None:
    # Changes: 1/4, 1/5, 1/6, 1/7, 1/8, none at the end. From 0: 1/4 + 1/5 = .45, + 1/6 = .617.
    profile = one_site(4, 5, 6, 7, 8, 9)
    assert block_caching(profile, 0.5).row("blocks.0.attn") == [1, 0, 1, 0, 0, 0]
    assert block_caching(profile, 0.3).row("blocks.0.attn") == [1, 1, 1, 1, 0, 0]
    assert block_caching(profile, 0.0).row("blocks.0.attn") == [1, 1, 1, 1, 1, 1]


def test_block_caching_averages_the_relative_change_of_the_runs() -> None:
    profile = profile_of(torch.tensor([[[1.0], [2], [2]], [[100], [100], [100]]]))
    assert block_caching(profile, 0.49).row("blocks.0.attn")[1] == 1
    assert block_caching(profile, 0.51).row("blocks.0.attn")[1] == 0


def test_invar_diff_reuses_where_the_change_slows_down_most() -> None:
    # Differences 8, 4, 4, 1, 1, 1: rates at 1..5 are .5, 1, .25, 1, 1; their median is 1.
    profile = one_site(0, 8, 12, 16, 17, 18, 19)
    first_pass = invar_diff(profile, 0.5, corrected=False)
    assert first_pass.row("blocks.0.attn") == [1, 0, 1, 0, 1, 1, 1]


def test_the_correction_compares_with_what_a_cached_run_would_have_seen() -> None:
    # Differences 8, 4, 2, 1, 2, 3: rates at 1..5 are .5, .5, .5, 2, 1.5. A first pass at quantile 0.7 (limit 1.3)
    # reuses 1, 2 and 3. In the second pass 2 is still moved on to, 3 and 4 are not: the rates at 3 and 4 are
    # (15 - 12) / 4 = .75 and (17 - 12) / 4 = 1.25, at 5 it is (20 - 17) / (17 - 12) = .6. The limit is .72.
    profile = one_site(0, 8, 12, 14, 15, 17, 20, lags=4)
    assert invar_diff(profile, 0.7, corrected=False).row("blocks.0.attn") == [1, 0, 0, 0, 1, 1, 1]
    assert invar_diff(profile, 0.7).row("blocks.0.attn") == [1, 0, 0, 1, 1, 0, 1]


def test_invar_diff_says_which_lags_it_misses() -> None:
    with pytest.raises(ProfileError, match=r"over 2 evaluations, the profile holds lags up to 1; profile with more"):
        invar_diff(one_site(0, 8, 12, 14, 15, 17, 21, lags=1), 0.7)


def test_invar_diff_computes_every_site_after_a_reuse_of_the_whole() -> None:
    whole, parts = "blocks.0..blocks.1", ("blocks.0.attn", "blocks.0.mlp")
    # Rates of the whole at 1..4: 1, 1/8, 8, 1, of which 0.3 takes the second; of the parts .5, .5, .5, 2.
    values = torch.tensor([[0, 8, 16, 17, 25, 33], [0, 8, 12, 14, 15, 17], [0, 8, 12, 14, 15, 17]]).T[None]
    schedule = invar_diff(profile_of(values, (whole, *parts)), 1.0, 0.3, corrected=False)
    assert schedule.row(whole) == [1, 1, 0, 1, 1, 1]
    for part in parts:
        assert schedule.row(part) == [1, 0, 0, 1, 1, 1]
        assert schedule.active(2, part) is None


def test_mag_cache_gives_the_schedules_of_diffusers() -> None:
    ratios = pytest.importorskip("diffusers.hooks.mag_cache").FLUX_MAG_RATIOS.tolist()
    golden = {
        (0.06, 3): "1111110101000100010001001011",
        (0.12, 4): "1111110010010000100001000101",
        (0.24, 5): "1111110001000001000001000010",
    }
    for (threshold, max_skip), wanted in golden.items():
        assert "".join(map(str, mag_cache_row(ratios, threshold, max_skip=max_skip))) == wanted


def test_mag_cache_wants_a_change() -> None:
    with pytest.raises(ProfileError, match="the profile, which holds none; profile one, or name the sites"):
        mag_cache(one_site(1, 1, 1), 0.1)
    values = torch.ones(1, 5, 2)
    schedule = mag_cache(profile_of(values, ("blocks.0.attn", "delta(blocks.0)")), 0.1, retention=0.4)
    assert [str(site) for site in schedule.sites] == ["delta(blocks.0)"]
    assert schedule.row("delta(blocks.0)") == [1, 1, 0, 0, 0]


def test_branches_are_decided_one_by_one() -> None:
    # Branch 0 stands still, branch 1 doubles.
    values = torch.tensor([1.0, 1, 1, 2, 1, 4, 1, 8])[None, :, None]
    profile = profile_of(values, branches=2)
    for schedule in (
        smooth_cache(profile, 0.1, lookahead=1),
        block_caching(profile, 0.9),
        mag_cache(profile, 0.1, retention=0.0, sites=["blocks.0.attn"]),
    ):
        row = schedule.row("blocks.0.attn")
        assert schedule.branches == 2
        assert row[2] == 0
        assert row[1::2][:-1] == [1, 1, 1]


def test_pairwise_reuses_the_smallest_errors_until_the_budget_is_met() -> None:
    # Over the later value: .5 at 1, .2 at 3, .1 at 5 for the one, twice that for the other.
    values = torch.tensor([[1.0, 2, 4, 5, 9, 10, 11], [0, 1, 3, 5, 4, 5, 5]]).T[None]
    profile = profile_of(values, ("blocks.0.attn", "blocks.0.mlp"))
    for budget, reused in ((1.0, 0), (0.94, 0), (0.93, 1), (0.87, 2), (0.8, 3), (0.5, 6)):
        schedule = pairwise(profile, "smooth-cache", budget)
        assert len(schedule.reuses) == reused
        assert schedule.cacheable == {1, 3, 5}
        assert profile.work.kept(schedule) >= budget
    order = [
        (e, str(site)) for e, site in sorted(pairwise(profile, "smooth-cache", 0.8).reuses, key=lambda entry: entry[0])
    ]
    assert order == [(3, "blocks.0.attn"), (5, "blocks.0.attn"), (5, "blocks.0.mlp")]


def test_pairwise_wants_evaluations_that_follow_a_full_one() -> None:
    with pytest.raises(ScheduleError, match="each follow one that computes"):
        pairwise(one_site(1, 2, 3, 4), "mag-cache", 0.5, among=[1, 2])


@pytest.mark.parametrize("error", ["smooth-cache", "block-caching", "invar-diff", "mag-cache"])
def test_pairwise_takes_every_statistic(error: str) -> None:
    profile = one_site(1, 2, 3, 8, 9, 9.5)
    schedule = pairwise(profile, error, 0.84)  # type: ignore[arg-type]
    # invar-diff has no rate for the last, and its change slows down at 3, from 5 to 1.
    assert [e for e, _ in schedule.reuses] == [3 if error == "invar-diff" else 5]


def test_a_budget_is_met_with_the_least_work_above_it() -> None:
    profile = one_site(4, 5, 6, 7, 8, 9)
    found = for_budget(lambda delta: block_caching(profile, delta), profile.work, 0.6)
    assert found.schedule == block_caching(profile, found.parameter)
    assert found.kept == profile.work.kept(found.schedule) == pytest.approx(1 - 2 * 0.9 / 6)
    least = for_budget(lambda delta: block_caching(profile, delta), profile.work, 0.01)
    assert least.schedule.row("blocks.0.attn") == [1, 0, 0, 0, 0, 0]
    with pytest.raises(ScheduleError, match=r"a budget wants the share that is kept, in \(0, 1\], got 0"):
        for_budget(lambda delta: block_caching(profile, delta), profile.work, 0)


@pytest.mark.parametrize("value", [-0.1, float("nan"), True, "much"])
def test_a_parameter_that_makes_no_sense_is_refused(value: float) -> None:
    profile = profile_of(torch.ones(1, 4, 1), ("delta(a)",))
    for select in (smooth_cache, block_caching, mag_cache):
        with pytest.raises(ScheduleError, match="wants a number from 0"):
            select(profile, value, sites=["delta(a)"])


def test_a_site_that_was_not_profiled_is_refused() -> None:
    with pytest.raises(UnknownSiteError, match=r"the profile has no site blocks.0.atn. did you mean 'blocks.0.attn'"):
        smooth_cache(one_site(1, 1, 1), 0.1, lookahead=1, sites=["blocks.0.atn"])


def test_a_profile_without_the_lags_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"wants lags 1..3, the profile holds 1..1; profile with more lags"):
        smooth_cache(one_site(1, 1, 1, lags=1), 0.1)


def test_numbers_that_are_not_finite_are_refused() -> None:
    values = torch.ones(1, 3, 1)
    values[0, 1] = float("nan")
    with pytest.raises(ProfileError, match=r"at evaluation 1 wants a finite number from 0, got nan; check the model"):
        profile_of(values)


def test_what_came_from_nothing_is_not_reused() -> None:
    profile = one_site(0, 3, 3, 0, 0, 0)
    assert pairwise(profile, "block-caching", 0.1).row("blocks.0.attn") == [1, 1, 1, 0, 1, 0]
    assert block_caching(profile, 1e9).row("blocks.0.attn") == [1, 1, 0, 0, 0, 0]
