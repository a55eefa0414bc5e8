"""DPM-Solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from l2c_compile.loops import (
    STABLE_DIFFUSION_BETAS,
    DPMSolver,
    Guidance,
)
from l2c_compile.loops.noise_schedules import DiscreteVP
from l2c_compile.models import UViT
from tests.toy_denoisers import gaussian_flow, gaussian_noise, relative_error, toy, toy_inputs


def test_dpm_solver_with_uvit_reproduces_the_authors_samples(shared: Callable[[str], Path]) -> None:
    golden = torch.load(shared("golden/uvit.pt"), weights_only=True)
    model = UViT(**golden["config"])
    model.load_state_dict(golden["state_dict"])
    null = {"y": golden["null_label"]}
    loop = DPMSolver(
        golden["nfe"],
        order=2,
        betas=STABLE_DIFFUSION_BETAS,
        first_timestep=1,
        guidance=Guidance(golden["cfg_scale"], null, batched=False, base="cond"),
    )
    with torch.no_grad():
        latent = loop(model, golden["noise"], y=golden["labels"])
    assert relative_error(latent, golden["full"]) <= 1e-5
    # theirs were interpolated in float32
    assert loop.network_timesteps == pytest.approx(golden["eval_timesteps"], abs=5e-4)
    assert loop.num_evaluations == 2 * golden["nfe"]


def dpm_error(loop: DPMSolver) -> float:
    torch.manual_seed(0)
    schedule = DiscreteVP(loop.betas)
    noise = torch.randn(4, 3, 5, dtype=torch.float64)

    def denoiser(x: Tensor, t_B: Tensor) -> Tensor:
        level = schedule.at((t_B[0].item() + 1 - loop.first_timestep) / loop.betas.num_timesteps)
        return gaussian_noise(x, level.alpha, level.sigma)

    first, last = schedule.at(1.0), schedule.at(1.0 / loop.betas.num_timesteps)
    exact = gaussian_flow(noise, (first.alpha, first.sigma), (last.alpha, last.sigma))
    return (loop(denoiser, noise) - exact).abs().max().item()


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize(
    ("method", "order", "few", "many"),
    [
        ("singlestep", 1, 40, 80),
        ("singlestep", 2, 40, 80),
        # 3k + 2 evaluations end in a step of order 2, whose local error does not spoil the global order. With fewer the
        # error changes sign between the channels and shows no order at all
        ("singlestep", 3, 122, 242),
        ("multistep", 2, 40, 80),
    ],
)
def test_dpm_solvers_converge_with_their_order(algorithm: str, method: str, order: int, few: int, many: int) -> None:
    settings: dict[str, Any] = {"algorithm": algorithm, "method": method, "order": order}
    settings |= {"lower_order_final": False, "spacing": "log_snr", "first_timestep": 1}

    def error(evaluations: int) -> float:
        return dpm_error(DPMSolver(evaluations, **settings))

    measured = math.log(error(few) / error(many)) / math.log(many / few)
    assert measured == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("spacing", ["time", "log_snr"])
@pytest.mark.parametrize("first_timestep", [0, 1])
def test_dpm_solvers_reach_the_exact_sample_for_any_spacing(spacing: str, first_timestep: int) -> None:
    settings: dict[str, Any] = {"spacing": spacing, "first_timestep": first_timestep}
    for method in ("singlestep", "multistep"):
        assert dpm_error(DPMSolver(200, **settings, method=method)) < 5e-3


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize(("steps", "lower_order_final"), [(27, False), (9, True)])
def test_multistep_dpm_solver_equals_diffusers(algorithm: str, steps: int, lower_order_final: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    noise, y = toy_inputs(torch.float64)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        algorithm_type=algorithm,
        final_sigmas_type="sigma_min",
        lower_order_final=lower_order_final,
    )
    # 999 is divisible by the steps: only then are the timesteps of diffusers, which it rounds, evenly spaced
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(toy(x, t.expand(3), y)[:, :4], t, x).prev_sample
    settings: dict[str, Any] = {"algorithm": algorithm, "lower_order_final": lower_order_final}
    loop = DPMSolver(steps, method="multistep", **settings)
    assert loop.timesteps == pytest.approx(scheduler.timesteps.tolist())
    assert relative_error(loop(toy, noise, y=y), x) < 1e-4
