"""DDIM."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from l2c_compile.loops import (
    DDIM,
    LINEAR_BETAS,
    Guidance,
)
from l2c_compile.models import DiT
from tests.toy_denoisers import MEAN, STD, gaussian_flow, gaussian_noise, relative_error, toy, toy_inputs

# the authors' records


def test_ddim_with_dit_reproduces_the_authors_samples(shared: Callable[[str], Path]) -> None:
    golden = torch.load(shared("golden/dit.pt"), weights_only=True)
    model = DiT(**golden["config"])
    model.load_state_dict(golden["state_dict"])
    loop = DDIM(golden["steps"], guidance=Guidance(golden["cfg_scale"], {"y": model.num_classes}, channels=3))
    with torch.no_grad():
        latent = loop(model, golden["noise"], y=golden["labels"])
    assert relative_error(latent, golden["full"]) <= 1e-5
    assert loop.timesteps == tuple(reversed(golden["timestep_map"]))


def test_ddim_converges_to_the_exact_sample() -> None:
    torch.manual_seed(0)
    noise = torch.randn(4, 3, 5, dtype=torch.float64)
    alphas_bar = LINEAR_BETAS.alphas_bar()

    def error(steps: int) -> float:
        def denoiser(x: Tensor, t_B: Tensor) -> Tensor:
            share = alphas_bar[int(t_B[0])]
            return gaussian_noise(x, math.sqrt(share), math.sqrt(1.0 - share))

        start = (math.sqrt(alphas_bar[-1]), math.sqrt(1.0 - alphas_bar[-1]))
        return (DDIM(steps)(denoiser, noise) - gaussian_flow(noise, start, (1.0, 0.0))).abs().max().item()

    assert error(500) < 0.01
    assert error(50) / error(100) == pytest.approx(2.0, abs=0.5)


def test_ancestral_ddim_keeps_the_distribution() -> None:
    torch.manual_seed(0)
    alphas_bar = LINEAR_BETAS.alphas_bar()

    def denoiser(x: Tensor, t_B: Tensor) -> Tensor:
        share = alphas_bar[int(t_B[0])]
        return gaussian_noise(x, math.sqrt(share), math.sqrt(1.0 - share))

    samples = DDIM(200, eta=1.0)(denoiser, torch.randn(4000, 3, 1, dtype=torch.float64))
    # 4000 samples: the standard error of the mean is 0.006, of the deviation 0.005
    torch.testing.assert_close(samples.mean(0, keepdim=True), MEAN, rtol=0, atol=0.03)
    torch.testing.assert_close(samples.std(0), torch.full((3, 1), STD, dtype=torch.float64), rtol=0, atol=0.03)


# diffusers


def test_ddim_equals_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    noise, y = toy_inputs(torch.float64)
    for spacing in ("leading", "trailing"):
        scheduler = diffusers.DDIMScheduler(
            beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing=spacing, steps_offset=0
        )
        scheduler.set_timesteps(20)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(toy(x, t.expand(3), y)[:, :4], t, x).prev_sample
        loop = DDIM(20, spacing=spacing)
        assert loop.timesteps == tuple(scheduler.timesteps.tolist())
        assert relative_error(loop(toy, noise, y=y), x) < 1e-5


# randomness


def test_only_eta_draws_noise_and_a_seed_repeats_it() -> None:
    noise, y = toy_inputs()

    def sample(eta: float, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return DDIM(6, eta=eta)(toy, noise, y=y)

    torch.testing.assert_close(sample(1.0, 1), sample(1.0, 1), rtol=0, atol=0)
    assert not torch.equal(sample(1.0, 1), sample(1.0, 2))
    torch.testing.assert_close(sample(0.0, 1), sample(0.0, 2), rtol=0, atol=0)


def test_every_step_but_the_last_draws_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[Tensor] = []
    original = torch.randn_like

    def counted(x: Tensor) -> Tensor:
        draws.append(x)
        return original(x)

    monkeypatch.setattr(torch, "randn_like", counted)
    noise, y = toy_inputs()
    DDIM(6, eta=1.0)(toy, noise, y=y)
    assert len(draws) == 5
