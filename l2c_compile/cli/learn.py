"""The body of ``l2c learn``: learn a router for a known model on samples of its own.

Started by ``accelerate launch -m l2c_compile learn ...`` several processes share the batch.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from l2c_compile.cli.plots import LEGEND, save_heat_map, terminal_heat_map
from l2c_compile.errors import ScheduleError
from l2c_compile.files.documents import replaced_at_once
from l2c_compile.finders.training import Draw, RoundReport
from l2c_compile.methods import L2CSettings, RolloutSettings, learn_l2c, learn_rollout
from l2c_compile.models.named import DIGITS, NamedModel, named_model
from l2c_compile.schedules.router import Router

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["learn_router"]

_SECONDS_A_PICTURE = 5.0


def learn_router(
    out: Path,
    console: Console,
    *,
    model: str = DIGITS,
    method: Literal["l2c", "rollout"] = "l2c",
    steps: int = 20,
    sites: tuple[str, ...] = (),
    resume: bool = False,
    png: Path | None = None,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    **settings: Any,  # noqa: ANN401 - the fields of the settings
) -> None:
    """Learn a router and write it.

    Args:
        out: The router file, safetensors. A checkpoint is kept next to it until it is written.
        console: Where to print; progress goes to stderr.
        model: "digits".
        method: "l2c" (pairs of a full and a cached evaluation) or "rollout" (whole trajectories, values of any age).
        steps: Sampler steps.
        sites: What may be reused; none takes attention and MLP of every block.
        resume: Go on from the checkpoint of an interrupted run.
        png: If given, a picture of the router is drawn there every few seconds.
        mixed_precision: Of the model's evaluations.
        **settings: Fields of ``L2CSettings`` or ``RolloutSettings``.

    Raises:
        L2CError: There is no such model or site, the settings do not fit, or a file is in the way.
        OSError: A file cannot be written.
    """
    checkpoint = out.with_name(out.name + ".checkpoint")
    _check_files(out, checkpoint, resume)
    known = named_model(model, with_weights=True)
    loop = known.loop(steps)
    accelerator = _accelerator(mixed_precision)
    is_main = accelerator is None or accelerator.is_main_process
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_main) as progress:
        task = progress.add_task("capture the model", total=None)
        watch = _Watch(progress, task, png if is_main else None)
        shared: dict[str, Any] = {"checkpoint": checkpoint, "accelerator": accelerator, "on_round": watch.on_round}
        given = known.denoiser, loop, _draw(known), sites or known.sublayers
        if method == "l2c":
            router = learn_l2c(*given, L2CSettings(**settings), **shared)
        else:
            router = learn_rollout(*given, RolloutSettings(**settings), **shared)
    if is_main:
        router.save(out)
        checkpoint.unlink(missing_ok=True)
        _print(console, router, out, png)


@dataclass
class _Watch:
    """Shows how learning goes."""

    progress: Progress
    task: TaskID
    png: Path | None
    drawn_s: float = 0.0

    def on_round(self, report: RoundReport) -> None:
        what = f"distance {report.distance:.3g}, {report.kept:.1%} kept, lambda {report.penalty:.2g}"
        self.progress.update(self.task, total=report.rounds, completed=report.round, description=what)
        is_last = report.round == report.rounds
        if self.png is not None and (is_last or time.monotonic() - self.drawn_s > _SECONDS_A_PICTURE):
            router = report.router()
            with replaced_at_once(self.png) as temporary:
                save_heat_map(router.schedule(), temporary, router=router)
            self.drawn_s = time.monotonic()


def _check_files(out: Path, checkpoint: Path, resume: bool) -> None:
    if out.exists():
        raise ScheduleError(f"{out} exists already; choose another --out, or move it away")
    if checkpoint.exists() and not resume:
        raise ScheduleError(
            f"{checkpoint} is left of an interrupted run; go on from it with --resume, or choose another --out"
        )
    if not os.access(out.parent, os.W_OK):
        raise ScheduleError(f"the folder {out.parent} does not exist or cannot be written to; make it first")


def _accelerator(mixed_precision: str) -> Accelerator | None:
    """Return what joins the processes, or None for a single one in the model's own precision."""
    if mixed_precision == "no" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        raise ScheduleError(
            "several processes and mixed precision want accelerate; pip install 'l2c-compile[train]'"
        ) from error
    return Accelerator(mixed_precision=mixed_precision, cpu=not torch.cuda.is_available())


def _draw(known: NamedModel) -> Draw:
    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, object]]:
        noise = torch.randn(count, *known.latent_shape, generator=generator)
        return noise, {"y": torch.randint(0, known.num_classes, (count,), generator=generator)}

    return draw


def _print(console: Console, router: Router, out: Path, png: Path | None) -> None:
    for line in terminal_heat_map(router.schedule(), width=console.width):
        console.print(line, no_wrap=True, overflow="ignore", crop=False)
    console.print(Text(LEGEND, style="dim"), soft_wrap=True)
    facts = ", ".join(f"{name} {value}" for name, value in router.info.items())
    console.print(Text(f"{router}: {facts}"), soft_wrap=True)
    console.print(Text(f"router written to {out}" + (f", picture to {png}" if png else "")), soft_wrap=True)
