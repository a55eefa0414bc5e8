"""Block Caching."""

from __future__ import annotations

import torch

from l2c_compile.methods import block_caching
from tests.small_profiles import one_site, profile_of


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
