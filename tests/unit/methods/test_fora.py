"""FORA."""

from __future__ import annotations

import pytest

from l2c_compile.errors import ScheduleError
from l2c_compile.methods import uniform_interval
from l2c_compile.schedules.schedule import CacheSchedule


def computed(schedule: CacheSchedule, site: str = "a") -> list[int]:
    return [e for e, value in enumerate(schedule.row(site)) if value]


def test_fora_is_aligned_to_the_end_as_its_authors_coded_it() -> None:
    schedule = uniform_interval(50, ["a", "b"], 3, anchor="end")
    assert computed(schedule) == computed(schedule, "b") == [0, *range(1, 50, 3)]


def test_an_interval_from_the_start_computes_its_multiples() -> None:
    assert computed(uniform_interval(10, ["a"], 4)) == [0, 4, 8]
    assert uniform_interval(10, ["a"], 1).reuses == {}


def test_an_interval_is_a_whole_number() -> None:
    with pytest.raises(ScheduleError, match="an interval wants a whole number from 1, got 0"):
        uniform_interval(4, ["a"], 0)
    with pytest.raises(ScheduleError, match="5 evaluations do not divide into branches of 2"):
        uniform_interval(5, ["a"], 2, branches=2)
