"""What every method has to beat."""

from __future__ import annotations

import pytest

from l2c_compile.errors import LoopError, ScheduleError
from l2c_compile.finders import Work, alternate_evaluations, within_budget
from l2c_compile.loops import DDIM, DPMSolver, FlowEuler, Guidance
from l2c_compile.methods import fewer_steps, random_reuse
from l2c_compile.schedules.sites import Site


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


def test_entries_are_given_up_in_order() -> None:
    a, b = Site("a"), Site("b")
    schedule = within_budget(4, (a, b), [(2, b), (1, a), (3, a)], 0.75)
    assert set(schedule.reuses) == {(2, b), (1, a)}


@pytest.mark.parametrize("budget", [0, 1.01, float("nan"), True])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(ScheduleError, match="a budget wants the share that is kept"):
        random_reuse(4, ["a"], budget, seed=0)


def test_fewer_steps_keeps_everything_else_of_a_loop() -> None:
    guidance = Guidance(1.5, null={"y": 3})
    assert fewer_steps(DDIM(steps=20, guidance=guidance), 0.5) == DDIM(steps=10, guidance=guidance)
    assert fewer_steps(DDIM(steps=20), 0.51).steps == 11
    assert fewer_steps(FlowEuler(steps=10), 0.3).steps == 3
    assert fewer_steps(DPMSolver(evaluations=20), 0.5).evaluations == 10
    with pytest.raises(LoopError, match="a share of the steps wants a number in"):
        fewer_steps(DDIM(steps=20), 0.0)
