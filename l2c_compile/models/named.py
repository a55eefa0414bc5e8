"""The denoisers that commands know by name, each with the loop that its authors sample with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l2c_compile.errors import ScheduleError, nearest
from l2c_compile.loops import DDIM, STABLE_DIFFUSION_BETAS, BuiltInLoop, DPMSolver, Guidance, loop_from_dict
from l2c_compile.models import DIT_PRESETS, UVIT_PRESETS, DiT, UViT, load_digits_dit
from l2c_compile.models.digits import GUIDANCE_SCALE
from l2c_compile.schedules.schedule import CacheSchedule

DIGITS = "digits"
_PRESETS = {name.lower(): name for name in (*DIT_PRESETS, *UVIT_PRESETS)}


@dataclass(frozen=True)
class NamedModel:
    """A denoiser of class-conditional images, with what is needed to sample from it."""

    name: str
    denoiser: DiT | UViT
    latent_shape: tuple[int, int, int]
    """The shape (channels, height, width) of a latent."""
    num_classes: int

    @property
    def device(self) -> torch.device:
        """The device that the weights are on; "meta" for a published size, which has none."""
        return next(self.denoiser.parameters()).device

    @property
    def sublayers(self) -> tuple[str, ...]:
        """The sites that schedules of the literature are about: attention and MLP of each block."""
        stacks = ("blocks",) if isinstance(self.denoiser, DiT) else ("in_blocks", "out_blocks")
        single = () if isinstance(self.denoiser, DiT) else ("mid_block",)
        paths = (*(f"{stack}.*" for stack in stacks), *single)
        return tuple(f"{path}.{name}" for path in paths for name in ("attn", "mlp"))

    @property
    def stacks(self) -> tuple[str, ...]:
        """The output and the change of the whole stack of blocks, as sites; empty if the blocks are not one run."""
        if not isinstance(self.denoiser, DiT):
            return ()
        run = f"blocks.0..blocks.{len(self.denoiser.blocks) - 1}"
        return (run, f"delta({run})")

    def loop(self, steps: int, branches: int = 1) -> BuiltInLoop:
        """Return the authors' loop; for a DPM-Solver, ``steps`` counts network evaluations."""
        if isinstance(self.denoiser, UViT):
            guidance = Guidance(
                scale=0.4, null={"y": self.denoiser.num_classes - 1}, batched=branches == 1, base="cond"
            )
            return DPMSolver(evaluations=steps, betas=STABLE_DIFFUSION_BETAS, first_timestep=1, guidance=guidance)
        null = {"y": self.denoiser.num_classes}
        if self.name == DIGITS:
            return DDIM(steps=steps, guidance=Guidance(GUIDANCE_SCALE, null=null, batched=branches == 1))
        return DDIM(steps=steps, guidance=Guidance(1.5, null=null, channels=3, batched=branches == 1))

    def loop_of(self, schedule: CacheSchedule, steps: int | None = None) -> BuiltInLoop:
        """Return the loop that a schedule is for: the one that it names, or else the authors'.

        Raises:
            ScheduleError: if the loop of that many ``steps`` has another number of evaluations than the schedule.
        """
        if steps is None and schedule.loop is not None:
            loop = loop_from_dict(schedule.loop)
        else:
            loop = self.loop(steps or schedule.num_evaluations // schedule.branches, schedule.branches)
        if loop.num_evaluations != schedule.num_evaluations:
            raise ScheduleError(
                f"the file is for {schedule.num_evaluations} evaluations, {loop.name} makes {loop.num_evaluations};"
                " leave --steps out to take what fits"
            )
        return loop

    def inputs(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return noise and labels, which run through the classes; they are equal for equal seeds."""
        noise = torch.randn(count, *self.latent_shape, generator=torch.Generator().manual_seed(seed))
        return noise, torch.arange(count) % self.num_classes


def named_model(name: str, *, with_weights: bool = False) -> NamedModel:
    """Return the denoiser of a name.

    Args:
        name: "digits" for the trained model, or the name of a published size, which has no weights.
        with_weights: whether a model without weights is refused.

    Raises:
        ScheduleError: if there is no such denoiser, or it has no weights and they are wanted.
    """
    if name.lower() == DIGITS:
        return NamedModel(DIGITS, load_digits_dit(), (1, 8, 8), 10)
    preset = _PRESETS.get(name.lower())
    if preset is None:
        known = [DIGITS, *_PRESETS]
        raise ScheduleError(f"no model is called {name!r}; {nearest(name.lower(), known) or ', '.join(known)}")
    if with_weights:
        raise ScheduleError(
            f"{preset} has no weights here and cannot be sampled; take digits, or give a model of your own in Python"
        )
    # The weights of a published size would take minutes to draw, and counting does not need them.
    with torch.device("meta"):
        denoiser: nn.Module = (DiT if preset in DIT_PRESETS else UViT).from_preset(preset).eval()
    assert isinstance(denoiser, DiT | UViT)
    return NamedModel(name, denoiser, (4, 32, 32), 1000)


def tolerance(num_evaluations: int) -> float:
    """Return the relative error that a static graph of the digits model may have.

    Where no bit may change, it has no error. Passes that round, packed weights among them, sum up to 384 products in
    another order in the four linear layers of each of 8 blocks. At four units of float32 each, that is 128 units for
    each evaluation.
    """
    return 128 * torch.finfo(torch.float32).eps * num_evaluations
