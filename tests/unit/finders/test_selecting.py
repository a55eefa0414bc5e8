"""What all selectors have in common."""

from __future__ import annotations

import pytest
import torch

from l2c_compile.errors import ProfileError, ScheduleError, UnknownSiteError
from l2c_compile.methods import block_caching, mag_cache, pairwise, smooth_cache
from tests.small_profiles import one_site, profile_of


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
