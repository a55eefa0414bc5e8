"""InvarDiff."""

from __future__ import annotations

import pytest
import torch

from l2c_compile.errors import ProfileError
from l2c_compile.methods import invar_diff
from tests.small_profiles import one_site, profile_of


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
