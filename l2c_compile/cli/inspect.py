"""``l2c inspect``: what a schedule or router file says, in numbers and as a picture, and what the passes make of it."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.table import Table

from l2c_compile.api import l2c_compile
from l2c_compile.cli.files import Case, output_path, read_schedule
from l2c_compile.cli.options import Force, Picture, ScheduleFile, Threshold
from l2c_compile.cli.plots import save_heat_map, show_heat_map
from l2c_compile.cli.terminal import bar, say, show
from l2c_compile.models.named import DIGITS, named_model
from l2c_compile.schedules.importers import Family
from l2c_compile.schedules.router import Router, schedule_of
from l2c_compile.schedules.schedule import CacheSchedule


def command(
    file: ScheduleFile,
    threshold: Threshold = None,
    family: Annotated[Family | None, typer.Option(help="For pickles: which project wrote it.")] = None,
    png: Picture = None,
    evaluations: Annotated[bool, typer.Option("--evaluations", help="List the evaluations one by one.")] = False,
    passes: Annotated[
        bool,
        typer.Option("--passes", help="List what each pass does to the static graph of a model, and why not more."),
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --passes: digits, or a published size: dit-xl/2, ...")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="With --passes: sampler steps; by default those of FILE.")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="B", min=1, help="With --passes: samples a call.")] = None,
    force: Force = False,
) -> None:
    """Show what a schedule or router file computes and reuses."""
    given = [name for name, value in (("model", model), ("steps", steps), ("batch", batch)) if value is not None]
    if given and not passes:
        raise typer.BadParameter("is for --passes only", param_hint=f"--{given[0]}")
    png = png and output_path(png, ".png", force=force, reads=file)
    content = read_schedule(file, threshold, family)
    router = content if isinstance(content, Router) else None
    schedule = schedule_of(content)
    _print(file.name, _facts(schedule, router))
    show_heat_map(schedule)
    if evaluations:
        show(_evaluation_table(schedule))
    if png is not None:
        save_heat_map(schedule, png, router=router)
        say(f"picture written to {png}")
    if passes:
        known = named_model(model or DIGITS)
        _explain(Case(schedule, known, known.loop_of(schedule, steps)), batch or 1)


def _explain(case: Case, batch: int) -> None:
    sampler = l2c_compile(case.model.denoiser, case.schedule, case.loop, numerics="rounding")
    device = case.model.device
    noise = torch.zeros(batch, *case.model.latent_shape, device=device)
    with bar("build the graph"):
        sampler.capture(noise, y=torch.zeros(batch, dtype=torch.int64, device=device))
    say(f"{case}, batch {batch}")
    show(sampler.explain())


def _facts(schedule: CacheSchedule, router: Router | None) -> dict[str, str]:
    computed = sum(schedule.computed_per_evaluation())
    cells = schedule.num_evaluations * len(schedule.sites)
    computed_cacheable, cacheable = schedule.computed_in_cacheable()
    patterns = sum(site.is_pattern for site in schedule.sites)
    facts = {
        "kind": "schedule" if router is None else f"router at threshold {router.threshold:g}",
        "evaluations": str(schedule.num_evaluations),
        "sites": str(len(schedule.sites)),
        "computed": f"{computed} of {cells} entries ({computed / cells:.2%})" if cells else "all, there are no sites",
        "cacheable": f"{len(schedule.cacheable)} evaluations, {computed_cacheable} of {cacheable} entries computed",
        "removed there": f"{schedule.removed_share():.2%}",
    }
    if patterns:
        facts["sites"] += f", {patterns} of them patterns that stand for several sites of a model"
    if schedule.branches > 1:
        facts["branches"] = f"{schedule.branches}: calls of one network evaluation, each with its own cache"
    if info := {key: value for key, value in schedule.info.items() if key != "threshold"}:
        facts["origin"] = ", ".join(f"{key} {value}" for key, value in info.items())
    facts["digest"] = schedule.digest[:16]
    return facts


def _print(name: str, facts: dict[str, str]) -> None:
    say(name, style="bold")
    width = max(map(len, facts))
    for key, value in facts.items():
        say(f"  {key:<{width}}  {_printable(value)}")
    say()


def _printable(text: str) -> str:
    """Return the text without control characters: a file must not steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _evaluation_table(schedule: CacheSchedule) -> Table:
    table = Table(box=None)
    for heading in ("evaluation", "computed", "share", "may reuse"):
        table.add_column(heading, justify="right")
    num_sites = len(schedule.sites)
    for e, computed in enumerate(schedule.computed_per_evaluation()):
        share = f"{computed / num_sites:.1%}" if num_sites else ""
        table.add_row(str(e), f"{computed}/{num_sites}", share, "yes" if e in schedule.cacheable else "no")
    return table
