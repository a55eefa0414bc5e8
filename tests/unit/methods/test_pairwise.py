"""Pairs with measured errors."""

from __future__ import annotations

import pytest
import torch

from l2c_compile.errors import ScheduleError
from l2c_compile.methods import pairwise
from tests.small_profiles import one_site, profile_of


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
