"""Flow matching with Euler steps."""

from __future__ import annotations

import pytest
import torch

from l2c_compile.loops import (
    FlowEuler,
)
from tests.toy_denoisers import relative_error, toy, toy_inputs


def test_flow_euler_is_exact_on_straight_paths() -> None:
    noise = torch.randn(4, 3, 5, dtype=torch.float64)
    clean = torch.randn(4, 3, 5, dtype=torch.float64)
    for shift in (1.0, 3.0):
        latent = FlowEuler(7, shift=shift)(lambda x, t_B: noise - clean, noise)
        torch.testing.assert_close(latent, clean, rtol=1e-12, atol=1e-12)


def test_flow_euler_equals_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    noise, y = toy_inputs()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0 - i / 6 for i in range(6)])
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(toy(x, t.expand(3), y)[:, :4], t, x).prev_sample
    loop = FlowEuler(6, shift=3.0)
    assert loop.timesteps == pytest.approx(scheduler.timesteps.tolist())
    assert relative_error(loop(toy, noise, y=y), x) < 1e-5
