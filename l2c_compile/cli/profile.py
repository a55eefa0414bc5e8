"""``l2c profile``: measure how the sites of a known model change, and keep that in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from l2c_compile.cli.files import output_path
from l2c_compile.cli.options import Batch, Digits, Force, Picture, Seed, Steps
from l2c_compile.cli.plots import save_profile_plot
from l2c_compile.cli.terminal import bar, say, show
from l2c_compile.finders import Profile, take_profile
from l2c_compile.models.named import DIGITS, named_model

_MAX_LAGS_SHOWN = 3


def command(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The profile; ends in .safetensors.")],
    model: Digits = DIGITS,
    steps: Steps = 20,
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Runs of the loop, without caching.")] = 16,
    batch: Batch = 1,
    lags: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="The most evaluations to look back; by default all.")
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE", help="What to measure; may be repeated. Sublayers of every block, whole stack."),
    ] = None,
    seed: Seed = 0,
    png: Picture = None,
    force: Force = False,
) -> None:
    """Measure once how the sites of a model change from evaluation to evaluation; `l2c schedule` decides from that."""
    out = output_path(out, ".safetensors", force=force)
    png = png and output_path(png, ".png", force=force)
    known = named_model(model, with_weights=True)
    loop = known.loop(steps)
    noise, labels = known.inputs(runs * batch, seed)
    inputs = [(noise[i : i + batch], {"y": labels[i : i + batch]}) for i in range(0, len(noise), batch)]
    with bar("run without caching", runs) as update:
        profile = take_profile(
            known.denoiser,
            loop,
            site or (*known.sublayers, *known.stacks),
            inputs,
            lags=lags or max(1, loop.num_evaluations - 1),
            on_run=lambda: update(advance=1),
        )
    profile.save(out)
    show(_table(profile))
    say(f"{profile!r} written to {out}")
    if png is not None:
        save_profile_plot(profile, png)
        say(f"picture written to {png}")


def _table(profile: Profile) -> Table:
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
