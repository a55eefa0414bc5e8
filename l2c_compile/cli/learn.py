"""``l2c learn``: learn a router for a known model on samples of its own.

Started by ``accelerate launch -m l2c_compile learn ...`` several processes share the batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from l2c_compile.cli.files import output_path
from l2c_compile.cli.options import Digits, Force, Steps
from l2c_compile.cli.plots import save_heat_map, show_heat_map
from l2c_compile.cli.terminal import bar, say
from l2c_compile.errors import ScheduleError
from l2c_compile.finders.training import Draw, RoundReport
from l2c_compile.methods import L2CSettings, RolloutSettings, learn_l2c, learn_rollout
from l2c_compile.models.named import DIGITS, NamedModel, named_model

if TYPE_CHECKING:
    from accelerate import Accelerator

_SECONDS_A_PICTURE = 5.0


def command(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The router; ends in .safetensors.")],
    budget: Annotated[
        float | None, typer.Option(metavar="SHARE", help="How much of the work may be left, between 0 and 1.")
    ] = None,
    penalty: Annotated[
        float | None, typer.Option(metavar="LAMBDA", help="In place of a budget: the price of a computed site.")
    ] = None,
    method: Annotated[
        Literal["l2c", "rollout"],
        typer.Option(help="l2c: every second evaluation is cached. rollout: any may reuse values of any age."),
    ] = "l2c",
    model: Digits = DIGITS,
    steps: Steps = 20,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Updates of every evaluation.")] = 80,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Samples of an update, over all processes.")] = 4,
    learning_rate: Annotated[float, typer.Option(metavar="RATE", help="Of AdamW on the logits.")] = 0.1,
    site: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE", help="What may be reused; may be repeated. Attention and MLP of every block."),
    ] = None,
    budget_in: Annotated[
        Literal["multiply-adds", "time"], typer.Option(help="The work that the budget is a share of.")
    ] = "multiply-adds",
    price_by: Annotated[
        Literal["sites", "multiply-adds", "time"], typer.Option(help="What a site costs relative to others.")
    ] = "sites",
    straight_through: Annotated[
        bool, typer.Option("--straight-through", help="Learn with scores rounded to 0 or 1.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of all that is drawn.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds between checkpoints.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Draw the router there while it learns.")
    ] = None,
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], typer.Option(help="Of the model's evaluations.")] = "no",
    force: Force = False,
) -> None:
    """Learn a router on samples that the model draws itself; give a budget or a penalty.

    Several processes share the work with `accelerate launch -m l2c_compile learn ...`. A checkpoint is kept beside the
    router until that is written.
    """
    if budget is not None and penalty is not None:
        raise ScheduleError("give a penalty or a budget, not both")
    out = output_path(out, ".safetensors", force=force)
    # A run that is resumed overwrites its own picture.
    png = png and output_path(png, ".png", force=force or resume)
    checkpoint = out.with_name(out.name + ".checkpoint")
    if checkpoint.exists() and not resume:
        raise ScheduleError(
            f"{checkpoint} is left of an interrupted run; go on from it with --resume, or choose another --out"
        )
    known = named_model(model, with_weights=True)
    loop = known.loop(steps)
    accelerator = _accelerator(mixed_precision)
    is_main = accelerator is None or accelerator.is_main_process
    settings: dict[str, Any] = {
        "budget": budget,
        "penalty": penalty,
        "rounds": rounds,
        "batch_size": batch,
        "learning_rate": learning_rate,
        "budget_in": budget_in,
        "price_by": price_by,
        "straight_through": straight_through,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
    }
    with bar("capture the model", shown=is_main) as update:
        on_round = _round_display(update, png if is_main else None)
        shared: dict[str, Any] = {"checkpoint": checkpoint, "accelerator": accelerator, "on_round": on_round}
        given = known.denoiser, loop, _draw(known), site or known.sublayers
        if method == "l2c":
            router = learn_l2c(*given, L2CSettings(**settings), **shared)
        else:
            router = learn_rollout(*given, RolloutSettings(**settings), **shared)
    if is_main:
        router.save(out)
        checkpoint.unlink(missing_ok=True)
        show_heat_map(router.schedule())
        say(f"{router}: {', '.join(f'{name} {value}' for name, value in router.info.items())}")
        say(f"router written to {out}" + (f", picture to {png}" if png else ""))


def _round_display(update: Callable[..., None], png: Path | None) -> Callable[[RoundReport], None]:
    """Return a function that shows each round's report: on the bar, and every few seconds as a picture."""
    drawn_s = 0.0

    def on_round(report: RoundReport) -> None:
        nonlocal drawn_s
        what = f"distance {report.distance:.3g}, {report.kept:.1%} kept, lambda {report.penalty:.2g}"
        update(total=report.rounds, completed=report.round, description=what)
        is_last = report.round == report.rounds
        if png is not None and (is_last or time.monotonic() - drawn_s > _SECONDS_A_PICTURE):
            router = report.router()
            save_heat_map(router.schedule(), png, router=router)
            drawn_s = time.monotonic()

    return on_round


def _accelerator(mixed_precision: str) -> Accelerator | None:
    """Return the Accelerator that joins the processes, or None for one process in the model's own precision."""
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
