"""Options and arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ScheduleFile = Annotated[
    Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A schedule or router.")
]
Threshold = Annotated[float | None, typer.Option(metavar="T", help="For routers: compute where the score is above T.")]

Model = Annotated[str, typer.Option(metavar="NAME", help="digits, or a published size: dit-xl/2, u-vit-h/2, ...")]
Digits = Annotated[str, typer.Option("--model", metavar="NAME", help="digits")]

Steps = Annotated[int, typer.Option(metavar="N", min=1, help="Sampler steps.")]
StepsOfFile = Annotated[
    int | None, typer.Option("--steps", metavar="N", min=1, help="Sampler steps; by default those that FILE is for.")
]
Batch = Annotated[int, typer.Option(metavar="B", min=1, help="Samples a call.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the noise.")]

Picture = Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Write a picture as well.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here as well.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
