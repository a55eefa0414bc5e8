"""Schedules from formulas against the lists of their authors."""

from __future__ import annotations

import pytest

from l2c_compile.errors import LoopError, ScheduleError
from l2c_compile.finders import Work, alternate_evaluations, within_budget
from l2c_compile.loops import DDIM, DPMSolver, FlowEuler, Guidance
from l2c_compile.methods import deep_cache, fewer_steps, random_reuse, uniform_interval
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site


def computed(schedule: CacheSchedule, site: str = "a") -> list[int]:
    return [e for e, value in enumerate(schedule.row(site)) if value]


def test_fora_is_aligned_to_the_end_as_its_authors_coded_it() -> None:
    schedule = uniform_interval(50, ["a", "b"], 3, anchor="end")
    assert computed(schedule) == computed(schedule, "b") == [0, *range(1, 50, 3)]


def test_an_interval_from_the_start_computes_its_multiples() -> None:
    assert computed(uniform_interval(10, ["a"], 4)) == [0, 4, 8]
    assert uniform_interval(10, ["a"], 1).reuses == {}


def test_branches_of_one_evaluation_are_decided_alike() -> None:
    assert computed(uniform_interval(8, ["a"], 2, branches=2)) == [0, 1, 4, 5]
    assert alternate_evaluations(8, branches=2) == [2, 3, 6, 7]
    assert alternate_evaluations(8) == [1, 3, 5, 7]
    assert alternate_evaluations(8, first=2) == [2, 4, 6]


def test_deep_cache_gives_the_list_of_its_code() -> None:
    assert computed(deep_cache(50, ["a"], 10)) == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    assert all(len(computed(deep_cache(50, ["a"], n))) == n for n in (1, 2, 5, 25))


def test_deep_cache_says_when_there_is_no_such_list() -> None:
    with pytest.raises(ScheduleError, match="50 different evaluations of 50 around 15; choose another center"):
        deep_cache(50, ["a"], 50)
    with pytest.raises(ScheduleError, match="num_computed wants a whole number from 1 to 50, got 0"):
        deep_cache(50, ["a"], 0)


def test_a_random_schedule_is_the_same_for_the_same_seed_only() -> None:
    one, same, other = (random_reuse(20, ["a", "b"], 0.5, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert one.computed_share() == 0.5


def test_a_random_schedule_keeps_its_share_of_the_multiply_adds() -> None:
    work = Work((100,) * 20, {Site("a"): (30,) * 20, Site("b"): (60,) * 20})
    schedule = random_reuse(20, ["a", "b"], 0.6, seed=3, work=work)
    assert 0.6 <= work.kept(schedule) < 0.6 + 60 / 2000
    pairs = random_reuse(20, ["a", "b"], 0.1, seed=3, work=work, among=alternate_evaluations(20))
    assert len(pairs.reuses) == 20
    assert pairs.cacheable == set(range(1, 20, 2))


def test_the_first_evaluation_cannot_reuse() -> None:
    with pytest.raises(ScheduleError, match="site a is reused at evaluation 0"):
        random_reuse(4, ["a"], 0.1, seed=0, among=[0])


def test_entries_are_given_up_in_order() -> None:
    a, b = Site("a"), Site("b")
    schedule = within_budget(4, (a, b), [(2, b), (1, a), (3, a)], 0.75)
    assert set(schedule.reuses) == {(2, b), (1, a)}


@pytest.mark.parametrize("budget", [0, 1.01, float("nan"), True])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(ScheduleError, match="a budget wants the share that is kept"):
        random_reuse(4, ["a"], budget, seed=0)


def test_an_interval_is_a_whole_number() -> None:
    with pytest.raises(ScheduleError, match="an interval wants a whole number from 1, got 0"):
        uniform_interval(4, ["a"], 0)
    with pytest.raises(ScheduleError, match="5 evaluations do not divide into branches of 2"):
        uniform_interval(5, ["a"], 2, branches=2)


def test_fewer_steps_keeps_everything_else_of_a_loop() -> None:
    guidance = Guidance(1.5, null={"y": 3})
    assert fewer_steps(DDIM(steps=20, guidance=guidance), 0.5) == DDIM(steps=10, guidance=guidance)
    assert fewer_steps(DDIM(steps=20), 0.51).steps == 11
    assert fewer_steps(FlowEuler(steps=10), 0.3).steps == 3
    assert fewer_steps(DPMSolver(evaluations=20), 0.5).evaluations == 10
    with pytest.raises(LoopError, match="a share of the steps wants a number in"):
        fewer_steps(DDIM(steps=20), 0.0)
