"""The bodies of ``l2c inspect``: what a schedule or router file says, and what the passes make of it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from l2c_compile.api import l2c_compile
from l2c_compile.cli.plots import LEGEND, save_heat_map, terminal_heat_map
from l2c_compile.models.named import DIGITS, named_model
from l2c_compile.schedules.importers import Family, load_schedule_file
from l2c_compile.schedules.router import Router
from l2c_compile.schedules.schedule import CacheSchedule

__all__ = ["explain_file", "inspect_file"]


def inspect_file(
    path: str | os.PathLike[str],
    console: Console,
    *,
    threshold: float | None = None,
    family: Family | None = None,
    png: str | os.PathLike[str] | None = None,
    evaluations: bool = False,
) -> None:
    """Print what a schedule or router file says.

    Args:
        path: A file that ``load_schedule_file`` reads.
        console: Where to print.
        threshold: For routers, in place of the usual one.
        family: For pickles, which project wrote it.
        png: If given, also write the picture there.
        evaluations: Whether to print the number of computed sites of each evaluation.

    Raises:
        L2CError: If the file cannot be read as a schedule or router.
        OSError: If a file cannot be read or written.
    """
    content = load_schedule_file(path, threshold=threshold, family=family)
    router = content if isinstance(content, Router) else None
    schedule = content.schedule() if isinstance(content, Router) else content
    _print(console, Path(path).name, _facts(schedule, router))
    for line in terminal_heat_map(schedule, width=console.width):
        console.print(line, no_wrap=True, overflow="ignore", crop=False)
    console.print(Text(LEGEND, style="dim"), soft_wrap=True)
    if evaluations:
        console.print(_evaluation_table(schedule))
    if png is not None:
        save_heat_map(schedule, png, router=router)
        console.print(Text(f"picture written to {os.fspath(png)}"), soft_wrap=True)


def explain_file(
    path: str | os.PathLike[str],
    console: Console,
    *,
    threshold: float | None = None,
    family: Family | None = None,
    model: str = DIGITS,
    steps: int | None = None,
    batch: int = 1,
) -> None:
    """Print what each pass does to the static graph of a model under a schedule or router; no backend compiles it.

    Args:
        path: a file that ``load_schedule_file`` reads.
        console: where to print.
        threshold: for routers, in place of the usual one.
        family: for pickles, which project wrote it.
        model: "digits", or a published size.
        steps: sampler steps; None takes the loop in the file, or as many as the file is for.
        batch: samples a call.

    Raises:
        L2CError: if the file cannot be read, there is no such model, or they do not fit together.
        OSError: if the file cannot be read.
    """
    content = load_schedule_file(path, threshold=threshold, family=family)
    schedule = content.schedule() if isinstance(content, Router) else content
    known = named_model(model)
    loop = known.loop_of(schedule, steps)
    sampler = l2c_compile(known.denoiser, schedule, loop, numerics="rounding")
    with console.status("build the graph"):
        noise = torch.zeros(batch, *known.latent_shape, device=known.device)
        sampler.capture(noise, y=torch.zeros(batch, dtype=torch.int64, device=known.device))
    console.print(f"{model}, {loop.name}, {loop.num_evaluations} evaluations, batch {batch}")
    console.print(sampler.explain())


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


def _print(console: Console, name: str, facts: dict[str, str]) -> None:
    console.print(Text(name, style="bold"))
    width = max(map(len, facts))
    for key, value in facts.items():
        console.print(Text(f"  {key:<{width}}  {_printable(value)}"), soft_wrap=True)
    console.print()


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
