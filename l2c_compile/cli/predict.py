"""The body of ``l2c predict``: what a schedule file will save on a known model."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from rich.console import Console

from l2c_compile.api import l2c_compile
from l2c_compile.models.named import DIGITS, named_model
from l2c_compile.schedules.importers import load_schedule_file
from l2c_compile.schedules.router import Router

__all__ = ["preview"]


def preview(
    path: str | os.PathLike[str],
    console: Console,
    *,
    model: str = DIGITS,
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
    known = named_model(model)
    loop = known.loop_of(schedule, steps)
    noise = torch.zeros(batch, *known.latent_shape, device=known.device)
    labels = torch.zeros(batch, dtype=torch.int64, device=known.device)
    sampler = l2c_compile(known.denoiser, replace(schedule, loop=None), loop, numerics="rounding")
    with console.status("build the graph"):
        prediction = sampler.predict(noise, y=labels)
    where = f"{loop.name}, {loop.num_evaluations} evaluations, batch {batch}, {known.device.type}"
    console.print(f"{model}, {where}")
    console.print(prediction)
