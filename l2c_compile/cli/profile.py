"""The body of ``l2c profile``: measure how the sites of a known model change, and keep that in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from l2c_compile.cli.plots import save_profile_plot
from l2c_compile.finders import Profile, take_profile
from l2c_compile.models.named import DIGITS, named_model

__all__ = ["profile_model", "profile_table"]

_MAX_LAGS_SHOWN = 3


def profile_model(
    out: str | os.PathLike[str],
    console: Console,
    *,
    model: str = DIGITS,
    steps: int = 20,
    num_runs: int = 16,
    batch: int = 1,
    lags: int | None = None,
    sites: Sequence[str] = (),
    seed: int = 0,
    png: str | os.PathLike[str] | None = None,
) -> None:
    """Take a profile, write it and print its changes.

    Args:
        out: The file, safetensors.
        console: Where to print; progress goes to stderr.
        model: "digits".
        steps: Sampler steps.
        num_runs: Runs of the loop.
        batch: Samples a run.
        lags: The most evaluations to look back; None takes all there are.
        sites: What to measure; none takes attention and MLP of every block, and the whole stack.
        seed: Of the noise.
        png: If given, also write a picture there.

    Raises:
        L2CError: There is no such model, site or loop.
        OSError: A file cannot be written.
    """
    known = named_model(model, with_weights=True)
    loop = known.loop(steps)
    noise, labels = known.inputs(num_runs * batch, seed)
    runs = [(noise[i : i + batch], {"y": labels[i : i + batch]}) for i in range(0, len(noise), batch)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("run without caching", total=num_runs)
        profile = take_profile(
            known.denoiser,
            loop,
            sites or (*known.sublayers, *known.stacks),
            runs,
            lags=lags or max(1, loop.num_evaluations - 1),
            on_run=lambda: progress.advance(task),
        )
    profile.save(out)
    console.print(profile_table(profile))
    console.print(Text(f"{profile!r} written to {os.fspath(out)}"), soft_wrap=True)
    if png is not None:
        save_profile_plot(profile, png)
        console.print(Text(f"picture written to {os.fspath(png)}"), soft_wrap=True)


def profile_table(profile: Profile) -> Table:
    """Return the change of each evaluation against earlier ones: the mean over the sites, and the largest."""
    table = Table(title="relative change (L1), mean over sites", title_justify="left")
    table.add_column("evaluation", justify="right")
    lags = range(1, min(_MAX_LAGS_SHOWN, profile.num_lags) + 1)
    for lag in lags:
        table.add_column(f"lag {lag}", justify="right")
    table.add_column("largest at lag 1", justify="right")
    for e in range(profile.num_evaluations):
        cells = []
        for lag in lags:
            change_S = profile.relative_change(lag)[e] if e >= lag * profile.branches else None
            cells.append("" if change_S is None else f"{change_S.mean():.3f}")
        largest = ""
        if e >= profile.branches:
            change_S = profile.relative_change(1)[e]
            largest = f"{change_S.max():.3f} {profile.sites[int(change_S.argmax())]}"
        table.add_row(str(e), *cells, largest)
    return table
