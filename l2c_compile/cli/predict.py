"""``l2c predict``: what a schedule file will save on a known model."""

from __future__ import annotations

import torch

from l2c_compile.api import l2c_compile
from l2c_compile.cli.files import load_case
from l2c_compile.cli.options import Batch, Model, ScheduleFile, StepsOfFile, Threshold
from l2c_compile.cli.terminal import bar, say, show
from l2c_compile.models.named import DIGITS


def command(
    file: ScheduleFile,
    model: Model = DIGITS,
    steps: StepsOfFile = None,
    threshold: Threshold = None,
    batch: Batch = 1,
) -> None:
    """Predict what a schedule will save, before anything is compiled.

    Time is measured for digits only; the published sizes are counted without their weights.
    """
    case = load_case(file, model, steps, threshold)
    device = case.model.device
    noise = torch.zeros(batch, *case.model.latent_shape, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    sampler = l2c_compile(case.model.denoiser, case.schedule, case.loop, numerics="rounding")
    with bar("build the graph"):
        prediction = sampler.predict(noise, y=labels)
    say(f"{case}, batch {batch}, {device.type}")
    show(prediction)
