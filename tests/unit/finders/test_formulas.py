"""What all formulas have in common."""

from __future__ import annotations

import pytest

from l2c_compile.errors import ScheduleError
from l2c_compile.finders import alternate_evaluations
from l2c_compile.methods import random_reuse, uniform_interval
from l2c_compile.schedules.schedule import CacheSchedule


def computed(schedule: CacheSchedule, site: str = "a") -> list[int]:
    return [e for e, value in enumerate(schedule.row(site)) if value]


def test_branches_of_one_evaluation_are_decided_alike() -> None:
    assert computed(uniform_interval(8, ["a"], 2, branches=2)) == [0, 1, 4, 5]
    assert alternate_evaluations(8, branches=2) == [2, 3, 6, 7]
    assert alternate_evaluations(8) == [1, 3, 5, 7]
    assert alternate_evaluations(8, first=2) == [2, 4, 6]


def test_the_first_evaluation_cannot_reuse() -> None:
    with pytest.raises(ScheduleError, match="site a is reused at evaluation 0"):
        random_reuse(4, ["a"], 0.1, seed=0, among=[0])
