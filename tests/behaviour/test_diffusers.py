"""Schedulers and models of diffusers: each compiled loop equals the eager one bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule
from tests.tiny import Residual, check_equals_reference, draw, residual, seeded

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def model() -> Residual:
    return residual()


def loop_over(name: str, num_steps: int = 4) -> Callable[..., Tensor]:
    def loop(denoiser: Callable[..., Tensor], x: Tensor) -> Tensor:
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(num_steps)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(denoiser(scaled, t.expand(x.shape[0])), t, x).prev_sample
        return x

    return loop


def count(loop: Callable[..., Tensor], noise: Tensor) -> int:
    calls = 0

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 0.1 * x

    loop(denoiser, noise)
    return calls


@pytest.mark.parametrize(
    "name",
    [
        *("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
        *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"),
        *("UniPCMultistepScheduler", "DEISMultistepScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
        *("EDMEulerScheduler", "LCMScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    ],
)
def test_a_scheduler_is_a_loop(model: Residual, name: str) -> None:
    loop, noise = loop_over(name), draw(3, 4)
    evaluations = count(loop, noise)
    table = {"a": [int(e % 2 == 0) for e in range(evaluations)], "b": [1] * evaluations}
    check_equals_reference(model, CacheSchedule.all_compute(evaluations, ["a", "b"]), loop, noise)
    check_equals_reference(model, CacheSchedule.from_table(table), loop, noise)


def test_a_transformer_of_diffusers_equals_the_reference() -> None:
    model: nn.Module = seeded(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=6,
        )
    )

    def loop(denoiser: Any, x: Tensor, labels: Tensor) -> Tensor:  # noqa: ANN401
        for t in (900, 500, 100):
            timestep = torch.full((x.shape[0],), t)
            x = x - 0.2 * denoiser(x, timestep=timestep, class_labels=labels).sample
        return x

    table = {"transformer_blocks.*.attn1": [1, 0, 0], "transformer_blocks.*.ff": [1, 1, 0]}
    schedule = CacheSchedule.from_table(table)
    check_equals_reference(model, schedule, loop, draw(2, 4, 4, 4), labels=torch.tensor([1, 2]))
