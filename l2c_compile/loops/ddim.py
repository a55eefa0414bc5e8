"""DDIM: Song et al., "Denoising Diffusion Implicit Models" (arXiv 2010.02502).

A step (equation 12 of the paper) is linear: ``keep * x + change * predicted_noise + fresh * drawn_noise``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from l2c_compile.errors import LoopError
from l2c_compile.loops.base import BuiltInLoop, check_count, check_number
from l2c_compile.loops.guidance import Denoiser, Guidance
from l2c_compile.loops.noise_schedules import LINEAR_BETAS, BetaSchedule, Spacing, respaced_timesteps


@dataclass(frozen=True)
class DDIM(BuiltInLoop):
    """The DDIM sampler over a trained beta schedule, for models that predict noise and take timesteps 0..N-1.

    Raises:
        LoopError: if a field makes no sense.
    """

    name: ClassVar[str] = "ddim"

    steps: int
    """Number of sampler steps."""
    eta: float = 0.0
    """The amount of fresh noise: 0 is deterministic, 1 has the variance of DDPM. Above 0, every step but the last draws
    ``torch.randn_like``."""
    spacing: Spacing = "linspace"
    """How the timesteps are chosen; see ``respaced_timesteps``."""
    betas: BetaSchedule = LINEAR_BETAS
    """The schedule that the model was trained with."""
    guidance: Guidance | None = None
    """The classifier-free guidance; None for none."""
    # These are made once, so that torch.compile of a function that samples finds numbers here, not their arithmetic.
    _coefficients: tuple[tuple[float, float, float], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_number("eta", self.eta, at_least=0.0)
        self._check_parts()
        object.__setattr__(self, "_coefficients", tuple(self._make_coefficients()))

    def __call__(self, denoiser: Denoiser, noise: Tensor, **conditions: object) -> Tensor:
        """Sample a batch of latents; see ``BuiltInLoop``."""
        x = noise
        for timestep, (keep, change, fresh) in zip(self.network_timesteps, self._coefficients, strict=True):
            x = keep * x + change * self._predict(denoiser, x, timestep, conditions)
            if fresh > 0.0:
                x = x + fresh * torch.randn_like(x)
        return x

    @property
    def network_timesteps(self) -> tuple[int, ...]:
        """The timestep of each guided prediction, in execution order."""
        return respaced_timesteps(self.betas.num_timesteps, self.steps, self.spacing)[::-1]

    @property
    def network_noise_levels(self) -> tuple[tuple[float, float], ...]:
        """The factors of signal and noise in the latent of each guided prediction, in execution order."""
        alphas_bar = self.betas.alphas_bar()
        return tuple((math.sqrt(alphas_bar[t]), math.sqrt(1.0 - alphas_bar[t])) for t in self.network_timesteps)

    def _make_coefficients(self) -> list[tuple[float, float, float]]:
        """Return the factors of latent, predicted noise and fresh noise for each step, in execution order."""
        alphas_bar = self.betas.alphas_bar()
        levels = [float(alphas_bar[t]) for t in self.network_timesteps] + [1.0]
        coefficients = []
        for now, then in itertools.pairwise(levels):
            variance = self.eta**2 * (1.0 - then) / (1.0 - now) * (1.0 - now / then)
            if variance > 1.0 - then:
                raise LoopError(f"eta {self.eta} adds more noise than a step may leave; use a smaller eta")
            keep = math.sqrt(then / now)
            change = math.sqrt(1.0 - then - variance) - keep * math.sqrt(1.0 - now)
            coefficients.append((keep, change, math.sqrt(variance)))
        return coefficients
