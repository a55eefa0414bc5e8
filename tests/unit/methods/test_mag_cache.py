"""MagCache."""

from __future__ import annotations

import pytest
import torch

from l2c_compile.errors import ProfileError
from l2c_compile.methods import mag_cache
from l2c_compile.methods.mag_cache import mag_cache_row
from tests.small_profiles import one_site, profile_of


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
