"""Noise schedules."""

from __future__ import annotations

import pytest

from l2c_compile.loops import (
    LINEAR_BETAS,
    STABLE_DIFFUSION_BETAS,
    BetaSchedule,
)
from l2c_compile.loops.noise_schedules import DiscreteVP, Spacing, respaced_timesteps

# noise schedules


def test_respacing_equals_the_dit_code() -> None:
    assert respaced_timesteps(1000, 10) == (0, 111, 222, 333, 444, 555, 666, 777, 888, 999)
    assert respaced_timesteps(1000, 4, "leading") == (0, 250, 500, 750)
    assert respaced_timesteps(1000, 4, "trailing") == (249, 499, 749, 999)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_respaced_timesteps_are_distinct_ascending_and_in_range(spacing: Spacing) -> None:
    for steps in (2, 3, 7, 51, 333, 999, 1000):
        picked = respaced_timesteps(1000, steps, spacing)
        assert len(set(picked)) == steps
        assert list(picked) == sorted(picked)
        assert 0 <= picked[0] <= picked[-1] <= 999


@pytest.mark.parametrize("betas", [LINEAR_BETAS, STABLE_DIFFUSION_BETAS])
def test_the_continuous_schedule_passes_through_the_trained_one(betas: BetaSchedule) -> None:
    schedule, alphas_bar = DiscreteVP(betas), betas.alphas_bar()
    for index in (0, 1, 500, 999):
        level = schedule.at((index + 1) / 1000)
        assert level.alpha**2 == pytest.approx(alphas_bar[index], rel=1e-12)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1.0, rel=1e-12)
        assert schedule.at_log_snr(level.log_snr).time == pytest.approx(level.time, rel=1e-9)
