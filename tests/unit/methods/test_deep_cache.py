"""DeepCache."""

from __future__ import annotations

import pytest

from l2c_compile.errors import ScheduleError
from l2c_compile.methods import deep_cache
from l2c_compile.schedules.schedule import CacheSchedule


def computed(schedule: CacheSchedule, site: str = "a") -> list[int]:
    return [e for e, value in enumerate(schedule.row(site)) if value]


def test_deep_cache_gives_the_list_of_its_code() -> None:
    assert computed(deep_cache(50, ["a"], 10)) == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    assert all(len(computed(deep_cache(50, ["a"], n))) == n for n in (1, 2, 5, 25))


def test_deep_cache_says_when_there_is_no_such_list() -> None:
    with pytest.raises(ScheduleError, match="50 different evaluations of 50 around 15; choose another center"):
        deep_cache(50, ["a"], 50)
    with pytest.raises(ScheduleError, match="num_computed wants a whole number from 1 to 50, got 0"):
        deep_cache(50, ["a"], 0)
