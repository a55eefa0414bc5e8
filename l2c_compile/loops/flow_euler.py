"""Euler's method for flow matching (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003).

The latent on the way is ``(1 - sigma) * clean + sigma * noise`` and the model predicts ``noise - clean``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from l2c_compile.loops.base import BuiltInLoop, check_count, check_number
from l2c_compile.loops.guidance import Denoiser, Guidance


@dataclass(frozen=True)
class FlowEuler(BuiltInLoop):
    """The Euler sampler from ``sigma`` 1 to 0, for models that predict a velocity.

    Raises:
        LoopError: if a field makes no sense.
    """

    name: ClassVar[str] = "flow_euler"

    steps: int
    """Number of sampler steps."""
    shift: float = 1.0
    """The shift of the timesteps: above 1, more steps are at the noisy end (Esser et al., arXiv 2403.03206, equation
    23; 3 for SD3)."""
    time_scale: float = 1000.0
    """The factor of the timesteps: the model is given ``sigma * time_scale``."""
    guidance: Guidance | None = None
    """The classifier-free guidance; None for none."""

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_number("shift", self.shift, above=0.0)
        check_number("time_scale", self.time_scale, above=0.0)
        self._check_parts()

    def __call__(self, denoiser: Denoiser, noise: Tensor, **conditions: object) -> Tensor:
        """Sample a batch of latents; see ``BuiltInLoop``."""
        x = noise
        sigmas = self.sigmas
        for timestep, now, then in zip(self.network_timesteps, sigmas, sigmas[1:], strict=False):
            x = x + (then - now) * self._predict(denoiser, x, timestep, conditions)
        return x

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The ``steps + 1`` noise levels, from 1 to 0."""
        even = (1.0 - i / self.steps for i in range(self.steps + 1))
        return tuple(self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma) for sigma in even)

    @property
    def network_timesteps(self) -> tuple[float, ...]:
        """The timestep of each guided prediction, in execution order."""
        return tuple(sigma * self.time_scale for sigma in self.sigmas[:-1])

    @property
    def network_noise_levels(self) -> tuple[tuple[float, float], ...]:
        """The factors of signal and noise in the latent of each guided prediction, in execution order."""
        return tuple((1.0 - sigma, sigma) for sigma in self.sigmas[:-1])
