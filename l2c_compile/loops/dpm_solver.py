"""DPM-Solver and DPM-Solver++: Lu et al. (arXiv 2206.00927, 2211.01095).

In half log-SNR ``l`` the sampling equation has an exact linear part, and a solver only has to guess how the model's
prediction ``p`` changes over a step from ``s`` to ``t`` of length ``h``. With ``p(l) = p_s + slope * (l - l_s) / h``:

    x_t = decay * x_s + hold * p_s + ramp * slope

where for predicted data (DPM-Solver++) ``decay = sigma_t / sigma_s``, ``k = alpha_t``, ``z = -h``, for predicted noise
(DPM-Solver) ``decay = alpha_t / alpha_s``, ``k = sigma_t``, ``z = h``, and for both

    hold = -k * expm1(z)        ramp = k * (1 - expm1(z) / z)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from l2c_compile.errors import LoopError
from l2c_compile.loops.base import BuiltInLoop, check_count
from l2c_compile.loops.guidance import Denoiser, Guidance
from l2c_compile.loops.noise_schedules import LINEAR_BETAS, BetaSchedule, DiscreteVP, NoiseLevel


class _Step(NamedTuple):
    """The noise levels of a solver step: those of its evaluations, the first of which is its start, and of its end."""

    stages: tuple[NoiseLevel, ...]
    end: NoiseLevel


class _Factors(NamedTuple):
    """The factors of an exponential integrator; the module docstring has the equations."""

    decay: float
    hold: float
    ramp: float


@dataclass(frozen=True)
class DPMSolver(BuiltInLoop):
    """The DPM-Solver sampler over a trained beta schedule, for models that predict noise.

    Time is ``t`` in [1 / N, 1]; sampling ends at 1 / N, the cleanest training timestep.

    Raises:
        LoopError: if a field makes no sense.
    """

    name: ClassVar[str] = "dpm_solver"

    evaluations: int
    """Number of guided predictions. A singlestep solver of order k makes up to k in each step, and ends with steps of
    lower order where k does not divide the number; order 3 always does (arXiv 2206.00927, appendix D.1)."""
    order: int = 2
    """The order of the solver: 1, 2 or 3 for singlestep, 1 or 2 for multistep. Order 1 is DDIM in continuous time."""
    method: Literal["singlestep", "multistep"] = "singlestep"
    """Where a step gets its further predictions: from evaluations inside the step, or from the step before."""
    algorithm: Literal["dpmsolver++", "dpmsolver"] = "dpmsolver++"
    """What is integrated: the predicted data (``"dpmsolver++"``) or the predicted noise (``"dpmsolver"``)."""
    spacing: Literal["time", "log_snr"] = "time"
    """The quantity that the steps cut into equal parts."""
    betas: BetaSchedule = LINEAR_BETAS
    """The schedule that the model was trained with."""
    first_timestep: Literal[0, 1] = 0
    """The number of the model's cleanest timestep: 0 (DiT, diffusers) or 1 (U-ViT)."""
    lower_order_final: bool = True
    """Whether a multistep solver makes its last step with order 1, which is steadier for few evaluations."""
    guidance: Guidance | None = None
    """The classifier-free guidance; None for none."""
    # These are made once, so that torch.compile of a function that samples finds numbers here, not their arithmetic.
    _steps: tuple[_Step, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_count("evaluations", self.evaluations)
        self._check_parts()
        choices = {
            "method": ("singlestep", "multistep"),
            "algorithm": ("dpmsolver++", "dpmsolver"),
            "spacing": ("time", "log_snr"),
            "first_timestep": (0, 1),
            "lower_order_final": (False, True),
            "order": (1, 2, 3) if self.method == "singlestep" else (1, 2),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise LoopError(f"{self.method} DPMSolver wants {name} in {allowed}, got {getattr(self, name)!r}")
        object.__setattr__(self, "_steps", tuple(self._make_steps()))

    def __call__(self, denoiser: Denoiser, noise: Tensor, **conditions: object) -> Tensor:
        """Sample a batch of latents; see ``BuiltInLoop``."""
        sample = self._singlestep if self.method == "singlestep" else self._multistep
        return sample(denoiser, noise, conditions)

    @property
    def network_timesteps(self) -> tuple[float, ...]:
        """The timestep of each guided prediction, in execution order."""
        return tuple(self._timestep(level) for step in self._steps for level in step.stages)

    @property
    def network_noise_levels(self) -> tuple[tuple[float, float], ...]:
        """The factors of signal and noise in the latent of each guided prediction, in execution order."""
        return tuple((level.alpha, level.sigma) for step in self._steps for level in step.stages)

    def _singlestep(self, denoiser: Denoiser, x: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        for stages, end in self._steps:
            start = stages[0]
            whole = self._factors(start, end)
            first = self._prediction(denoiser, x, start, conditions)
            if len(stages) == 1:
                x = whole.decay * x + whole.hold * first
                continue
            inner = self._factors(start, stages[1])
            x_inner = inner.decay * x + inner.hold * first
            second = self._prediction(denoiser, x_inner, stages[1], conditions)
            if len(stages) == 2:
                x = whole.decay * x + whole.hold * second
                continue
            # The stages are at 1/3 and 2/3: the slope over 2/3 is twice the first difference, and the slope over the
            # whole step is 3/2 of the second.
            inner = self._factors(start, stages[2])
            x_inner = inner.decay * x + (inner.hold - 2.0 * inner.ramp) * first + 2.0 * inner.ramp * second
            third = self._prediction(denoiser, x_inner, stages[2], conditions)
            x = whole.decay * x + (whole.hold - 1.5 * whole.ramp) * first + 1.5 * whole.ramp * third
        return x

    def _multistep(self, denoiser: Denoiser, x: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        steps = self._steps
        previous: Tensor | None = None
        length_before = 0.0
        for i, (stages, end) in enumerate(steps):
            start = stages[0]
            factors = self._factors(start, end)
            length = end.log_snr - start.log_snr
            prediction = self._prediction(denoiser, x, start, conditions)
            is_last = i == len(steps) - 1
            if self.order == 1 or previous is None or (is_last and self.lower_order_final):
                x = factors.decay * x + factors.hold * prediction
            else:
                # The prediction is extrapolated to the middle of the step (arXiv 2211.01095, algorithm 2).
                ahead = 0.5 * length / length_before
                x = factors.decay * x + (factors.hold * (1.0 + ahead)) * prediction - (factors.hold * ahead) * previous
            previous, length_before = prediction, length
        return x

    def _prediction(self, denoiser: Denoiser, x: Tensor, level: NoiseLevel, conditions: Mapping[str, Any]) -> Tensor:
        """Return the quantity that the algorithm integrates: the predicted noise, or the data that follow from it."""
        noise = self._predict(denoiser, x, self._timestep(level), conditions)
        if self.algorithm == "dpmsolver":
            return noise
        return (1.0 / level.alpha) * x - (level.sigma / level.alpha) * noise

    def _factors(self, start: NoiseLevel, end: NoiseLevel) -> _Factors:
        length = end.log_snr - start.log_snr
        if self.algorithm == "dpmsolver++":
            decay, scale, z = end.sigma / start.sigma, end.alpha, -length
        else:
            decay, scale, z = end.alpha / start.alpha, end.sigma, length
        return _Factors(decay, -scale * math.expm1(z), scale * (1.0 - math.expm1(z) / z))

    def _timestep(self, level: NoiseLevel) -> float:
        return level.time * self.betas.num_timesteps + (self.first_timestep - 1)

    def _make_steps(self) -> list[_Step]:
        """Return the solver steps in execution order."""
        schedule = DiscreteVP(self.betas)
        orders = self._orders()
        # As in the authors' code, the parts are equal for each evaluation in time, and for each step in log-SNR.
        if self.spacing == "time":
            ends = [sum(orders[:i]) for i in range(len(orders) + 1)]
            last = 1.0 / self.betas.num_timesteps
            times = [1.0 + (last - 1.0) * end / self.evaluations for end in ends]
            levels = [schedule.at(time) for time in times]
        else:
            first, final = schedule.at(1.0), schedule.at(1.0 / self.betas.num_timesteps)
            width = (final.log_snr - first.log_snr) / len(orders)
            levels = [schedule.at_log_snr(first.log_snr + i * width) for i in range(len(orders) + 1)]
        steps = []
        for order, start, end in zip(orders, levels, levels[1:], strict=False):
            length = end.log_snr - start.log_snr
            inner = (schedule.at_log_snr(start.log_snr + length * k / order) for k in range(1, order))
            steps.append(_Step((start, *inner), end))
        return steps

    def _orders(self) -> list[int]:
        """Return the number of evaluations of each step."""
        if self.method == "multistep" or self.order == 1:
            return [1] * self.evaluations
        full, rest = divmod(self.evaluations, self.order)
        if self.order == 3 and rest == 0:
            return [3] * (full - 1) + [2, 1]
        return [self.order] * full + [rest] * (rest > 0)
