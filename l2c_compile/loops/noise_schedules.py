"""Noise schedules: how much noise there is at which timestep, in float64 and without tensors.

All are variance preserving: a noisy latent is ``alpha * clean + sigma * noise`` with ``alpha**2 + sigma**2 == 1``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from l2c_compile.errors import LoopError

Spacing = Literal["linspace", "leading", "trailing"]
"""How a sampler picks its timesteps; see ``respaced_timesteps``."""


@dataclass(frozen=True)
class BetaSchedule:
    """The variances that a model was trained with.

    Raises:
        LoopError: if a field makes no sense.
    """

    kind: Literal["linear", "scaled_linear"] = "linear"
    """The quantity that grows linearly: beta, or its square root (``scaled_linear``, as in Stable Diffusion)."""
    start: float = 1e-4
    """The beta of the cleanest timestep."""
    end: float = 0.02
    """The beta of the noisiest timestep."""
    num_timesteps: int = 1000
    """Number of training timesteps."""

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "scaled_linear"):
            raise LoopError(f"betas are 'linear' or 'scaled_linear', got {self.kind!r}")
        if not 0.0 < self.start <= self.end < 1.0:
            raise LoopError(f"betas want 0 < start <= end < 1, got start {self.start} and end {self.end}")
        if not isinstance(self.num_timesteps, int) or self.num_timesteps < 1:
            raise LoopError(f"betas want a positive number of timesteps, got {self.num_timesteps!r}")

    def betas(self) -> NDArray[np.float64]:
        """Return the variances, shape (num_timesteps,), from clean to noisy."""
        is_root = self.kind == "scaled_linear"
        start, end = (math.sqrt(self.start), math.sqrt(self.end)) if is_root else (self.start, self.end)
        values = np.linspace(start, end, self.num_timesteps, dtype=np.float64)
        return values * values if is_root else values

    def alphas_bar(self) -> NDArray[np.float64]:
        """Return the share of the signal's variance that is left, shape (num_timesteps,), from clean to noisy."""
        return np.cumprod(1.0 - self.betas(), dtype=np.float64)


LINEAR_BETAS = BetaSchedule()
"""The schedule of Ho et al. (arXiv 2006.11239), section 4, which DiT uses."""

STABLE_DIFFUSION_BETAS = BetaSchedule("scaled_linear", 0.00085, 0.012)
"""The schedule of Rombach et al. (arXiv 2112.10752) in the released configurations, which the latent U-ViTs use."""


def respaced_timesteps(num_timesteps: int, steps: int, spacing: Spacing = "linspace") -> tuple[int, ...]:
    """Pick the timesteps of a shorter sampler.

    Args:
        num_timesteps: the number N of training timesteps.
        steps: the number of timesteps to pick.
        spacing: ``"linspace"`` spreads them from 0 to N - 1 (as the DiT code does; it needs two steps), ``"leading"``
            takes multiples of ``N // steps`` from 0 (as the DDIM code does), ``"trailing"`` counts down from N - 1.

    Returns:
        The timesteps in ascending order, that is from clean to noisy.

    Raises:
        LoopError: if there are not that many timesteps, or the spacing is unknown.
    """
    if not 1 <= steps <= num_timesteps:
        raise LoopError(f"a sampler over {num_timesteps} timesteps takes 1 to {num_timesteps} steps, got {steps}")
    if spacing == "leading":
        return tuple(range(0, num_timesteps, num_timesteps // steps))[:steps]
    if spacing == "trailing":
        return tuple(sorted(round(num_timesteps - i * num_timesteps / steps) - 1 for i in range(steps)))
    if spacing != "linspace":
        raise LoopError(f"spacing is 'linspace', 'leading' or 'trailing', got {spacing!r}")
    if steps == 1:
        raise LoopError("spacing 'linspace' starts at the clean end and wants two steps, got 1; use 'trailing'")
    # The stride is summed, not multiplied, so that ties round as they do in the DiT code.
    stride = (num_timesteps - 1) / (steps - 1)
    return tuple(round(position) for position in itertools.accumulate([0.0] + [stride] * (steps - 1)))


class NoiseLevel(NamedTuple):
    """A point of a continuous noise schedule."""

    time: float
    """The continuous time; 1 is noise."""
    alpha: float
    """The factor of the signal."""
    sigma: float
    """The factor of the noise."""
    log_snr: float
    """Half of the log signal-to-noise ratio, ``log(alpha / sigma)``: the lambda of the DPM-Solver papers."""


class DiscreteVP:
    """A continuous view of a trained schedule, in which ``log alpha`` is linear between training timesteps.

    The view is that of Lu et al., "DPM-Solver" (arXiv 2206.00927), appendix D.4. Time runs from 1 / N (the cleanest) to
    1 (noise).

    Args:
        betas: the schedule that the model was trained with.
    """

    def __init__(self, betas: BetaSchedule) -> None:
        self._times = np.arange(1, betas.num_timesteps + 1) / betas.num_timesteps
        self._log_alphas = 0.5 * np.cumsum(np.log1p(-betas.betas()))

    def at(self, time: float) -> NoiseLevel:
        """Return the noise level at a time in [1 / N, 1]."""
        log_alpha = float(np.interp(time, self._times, self._log_alphas))
        log_sigma = 0.5 * math.log(-math.expm1(2.0 * log_alpha))
        return NoiseLevel(time, math.exp(log_alpha), math.exp(log_sigma), log_alpha - log_sigma)

    def at_log_snr(self, log_snr: float) -> NoiseLevel:
        """Return the noise level with the given half log signal-to-noise ratio."""
        log_alpha = -0.5 * float(np.logaddexp(0.0, -2.0 * log_snr))
        # np.interp wants ascending abscissae, but log alpha falls with time.
        time = float(np.interp(log_alpha, self._log_alphas[::-1], self._times[::-1]))
        return NoiseLevel(time, math.exp(log_alpha), math.exp(log_alpha - log_snr), log_snr)
