"""The parameter of a selector that meets a budget."""

from __future__ import annotations

import pytest

from l2c_compile.errors import ScheduleError
from l2c_compile.finders import for_budget
from l2c_compile.methods import block_caching
from tests.small_profiles import one_site


def test_a_budget_is_met_with_the_least_work_above_it() -> None:
    profile = one_site(4, 5, 6, 7, 8, 9)
    found = for_budget(lambda delta: block_caching(profile, delta), profile.work, 0.6)
    assert found.schedule == block_caching(profile, found.parameter)
    assert found.kept == profile.work.kept(found.schedule) == pytest.approx(1 - 2 * 0.9 / 6)
    least = for_budget(lambda delta: block_caching(profile, delta), profile.work, 0.01)
    assert least.schedule.row("blocks.0.attn") == [1, 0, 0, 0, 0, 0]
    with pytest.raises(ScheduleError, match=r"a budget wants the share that is kept, in \(0, 1\], got 0"):
        for_budget(lambda delta: block_caching(profile, delta), profile.work, 0)
