"""The body of ``l2c predict``: what a schedule file will save on a known model."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from rich.console import Console
from torch import nn

from l2c_compile.api import l2c_compile
from l2c_compile.errors import LoopError, ScheduleError, nearest
from l2c_compile.importers import load_schedule_file
from l2c_compile.loops import DDIM, STABLE_DIFFUSION_BETAS, DPMSolver, Guidance, Loop, loop_from_dict
from l2c_compile.models import DIT_PRESETS, UVIT_PRESETS, DiT, UViT, load_digits_dit
from l2c_compile.router import Router

__all__ = ["preview"]

_DIGITS = "digits"
_PRESETS = {name.lower(): name for name in (*DIT_PRESETS, *UVIT_PRESETS)}


def preview(
    path: str | os.PathLike[str],
    console: Console,
    *,
    model: str = _DIGITS,
    steps: int | None = None,
    threshold: float | None = None,
    batch: int = 1,
) -> None:
    """Print the prediction for a schedule or router on a model.

    Args:
        path: A file that ``load_schedule_file`` reads.
        console: Where to print.
        model: "digits" (the trained one, timed on the CPU), or a published size (only counted).
        steps: Sampler steps; None takes the loop in the file, or as many as the file is for.
        threshold: For routers, in place of the usual one.
        batch: Samples a call.

    Raises:
        L2CError: The file cannot be read, there is no such model, or they do not fit together.
        OSError: The file cannot be read.
    """
    content = load_schedule_file(path, threshold=threshold)
    schedule = content.schedule() if isinstance(content, Router) else content
    denoiser = _model(model)
    if steps is None and schedule.loop is not None:
        loop = loop_from_dict(schedule.loop)
    else:
        loop = _loop(denoiser, steps, schedule.num_evaluations, schedule.branches)
    if loop.num_evaluations != schedule.num_evaluations:
        raise ScheduleError(
            f"the file is for {schedule.num_evaluations} evaluations, {loop.name} makes {loop.num_evaluations};"
            " leave --steps out to take what fits"
        )
    device = next(denoiser.parameters()).device
    channels, size = (1, 8) if model == _DIGITS else (4, 32)
    noise = torch.zeros(batch, channels, size, size, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    sampler = l2c_compile(denoiser, replace(schedule, loop=None), loop, numerics="rounding")
    with console.status("build the graph"):
        prediction = sampler.predict(noise, y=labels)
    console.print(f"{model}, {loop.name}, {loop.num_evaluations} evaluations, batch {batch}, {device.type}")
    console.print(prediction)


def _model(name: str) -> nn.Module:
    if name.lower() == _DIGITS:
        return load_digits_dit()
    preset = _PRESETS.get(name.lower())
    if preset is None:
        known = [_DIGITS, *_PRESETS]
        raise ScheduleError(f"no model is called {name!r}; {nearest(name.lower(), known) or ', '.join(known)}")
    # The weights of a published size would take minutes to draw, and are not needed to count.
    with torch.device("meta"):
        return (DiT if preset in DIT_PRESETS else UViT).from_preset(preset).eval()


def _loop(denoiser: nn.Module, steps: int | None, num_evaluations: int, branches: int) -> Loop:
    """Return the loop that the authors of the model sample with."""
    if isinstance(denoiser, UViT):
        guidance = Guidance(scale=0.4, null={"y": denoiser.num_classes - 1}, batched=branches == 1, base="cond")
        evaluations = steps or num_evaluations // branches
        return DPMSolver(evaluations=evaluations, betas=STABLE_DIFFUSION_BETAS, first_timestep=1, guidance=guidance)
    if not isinstance(denoiser, DiT):
        raise LoopError(f"l2c predict knows no loop for a {type(denoiser).__name__}")
    guided = min(3, denoiser.in_channels)
    guidance = Guidance(scale=1.5, null={"y": denoiser.num_classes}, channels=guided, batched=branches == 1)
    return DDIM(steps=steps or num_evaluations // branches, guidance=guidance)
