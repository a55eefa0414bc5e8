"""SmoothCache."""

from __future__ import annotations

import torch

from l2c_compile.methods import smooth_cache
from tests.small_profiles import one_site, profile_of


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
