"""The commands ``l2c schedule METHOD``: names, options and defaults; the bodies are in ``scheduling.py``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["schedule_app"]

schedule_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Make a schedule file, from a profile or by a formula."
)

_Profile = Annotated[
    Path, typer.Option("--profile", metavar="FILE", exists=True, dir_okay=False, help="What `l2c profile` wrote.")
]
_Out = Annotated[Path, typer.Option("--out", metavar="FILE", dir_okay=False, help="The schedule, JSON.")]
_Budget = Annotated[
    float | None,
    typer.Option("--budget", metavar="B", help="In place of it: the share of the multiply-adds to keep, above 0."),
]
_Share = Annotated[
    float, typer.Option("--budget", metavar="B", help="The share of the multiply-adds to keep, above 0.")
]
_Evaluations = Annotated[int, typer.Option(metavar="E", min=1, help="Evaluations of the loop.")]
_Branches = Annotated[int, typer.Option(metavar="N", min=1, help="2 for guidance in two separate calls.")]
_Sites = Annotated[
    list[str] | None,
    typer.Option("--site", metavar="SITE", help="What is reused; may be repeated. Attention and MLP of every block."),
]
_SUBLAYERS = ("blocks.*.attn", "blocks.*.mlp")


class _By(str, Enum):
    type = "type"
    site = "site"


class _Anchor(str, Enum):
    start = "start"
    end = "end"


class _Error(str, Enum):
    smooth_cache = "smooth-cache"
    block_caching = "block-caching"
    invar_diff = "invar-diff"
    mag_cache = "mag-cache"


# In each command: imported late, because `l2c --help` should not wait for torch.


@schedule_app.command("smooth-cache")
def smooth_cache(
    profile: _Profile,
    out: _Out,
    alpha: Annotated[float | None, typer.Option(metavar="A", help="The largest relative error.")] = None,
    budget: _Budget = None,
    lookahead: Annotated[int, typer.Option(metavar="K", min=1, help="The longest reuse.")] = 3,
    by: Annotated[
        _By, typer.Option(help="One row for sites of one type, as published, or one for each site.")
    ] = _By.type,
) -> None:
    """SmoothCache: jump as far as the error at that lag allows."""
    from rich.console import Console

    from l2c_compile.cli.schedule_files import write_selected
    from l2c_compile.methods import smooth_cache as select

    write_selected(
        out,
        Console(),
        profile,
        lambda measured, value: select(measured, value, lookahead=lookahead, by=by.value),
        parameter=alpha,
        budget=budget,
        name="alpha",
    )


@schedule_app.command("block-caching")
def block_caching(
    profile: _Profile,
    out: _Out,
    delta: Annotated[float | None, typer.Option(metavar="D", help="How much change may add up.")] = None,
    budget: _Budget = None,
) -> None:
    """Block Caching: keep a value until its changes add up."""
    from rich.console import Console

    from l2c_compile.cli.schedule_files import write_selected
    from l2c_compile.methods import block_caching as select

    write_selected(out, Console(), profile, select, parameter=delta, budget=budget, name="delta")


@schedule_app.command("invar-diff")
def invar_diff(
    profile: _Profile,
    out: _Out,
    strength: Annotated[
        float | None,
        typer.Option(metavar="S", min=0, max=1, help="Quantile of the whole stack; the authors' fast setting is 0.63."),
    ] = None,
    budget: _Budget = None,
) -> None:
    """InvarDiff: reuse the whole stack, or its sites, where their change slows down most."""
    from rich.console import Console

    from l2c_compile.cli.schedule_files import write_selected
    from l2c_compile.methods.invar_diff import invar_diff_scaled

    write_selected(
        out, Console(), profile, invar_diff_scaled, parameter=strength, budget=budget, name="strength", highest=1.0
    )


@schedule_app.command("mag-cache")
def mag_cache(
    profile: _Profile,
    out: _Out,
    threshold: Annotated[float | None, typer.Option(metavar="T", help="How much predicted error may add up.")] = None,
    budget: _Budget = None,
    max_skip: Annotated[int, typer.Option(metavar="K", min=0, help="The most reuses in a row.")] = 3,
    retention: Annotated[
        float, typer.Option(metavar="R", help="The share of evaluations computed at the start.")
    ] = 0.2,
) -> None:
    """MagCache: reuse the change of the whole stack while its magnitude is predicted to stay."""
    from rich.console import Console

    from l2c_compile.cli.schedule_files import write_selected
    from l2c_compile.methods import mag_cache as select

    write_selected(
        out,
        Console(),
        profile,
        lambda measured, value: select(measured, value, max_skip=max_skip, retention=retention),
        parameter=threshold,
        budget=budget,
        name="threshold",
    )


@schedule_app.command("pairwise")
def pairwise(
    profile: _Profile,
    out: _Out,
    budget: _Share,
    error: Annotated[_Error, typer.Option(help="Whose statistic is the error of a reuse.")] = _Error.smooth_cache,
) -> None:
    """Reuse the smallest errors in alternate evaluations, the setting of Learning-to-Cache."""
    from rich.console import Console

    from l2c_compile.cli.schedule_files import write_pairwise

    write_pairwise(out, Console(), profile, error=error.value, budget=budget)


@schedule_app.command("random")
def random(
    profile: _Profile,
    out: _Out,
    budget: _Share,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draw.")] = 0,
    pairs: Annotated[bool, typer.Option("--pairs", help="Only alternate evaluations may reuse.")] = False,
) -> None:
    """Reuse sites at random: what any method should beat."""
    from rich.console import Console

    from l2c_compile.cli.schedule_files import write_random

    write_random(out, Console(), profile, budget=budget, seed=seed, pairs=pairs)


@schedule_app.command("uniform")
def uniform(
    evaluations: _Evaluations,
    out: _Out,
    interval: Annotated[int, typer.Option(metavar="N", min=1, help="Compute in every N-th evaluation.")],
    anchor: Annotated[
        _Anchor, typer.Option(help="Count from the start (DeepCache), or from the end, as FORA is coded.")
    ] = _Anchor.start,
    sites: _Sites = None,
    branches: _Branches = 1,
) -> None:
    """FORA and DeepCache's uniform setting: compute in every N-th evaluation, reuse in between."""
    from rich.console import Console

    from l2c_compile.cli.schedule_files import write_uniform

    write_uniform(
        out,
        Console(),
        num_evaluations=evaluations,
        sites=sites or _SUBLAYERS,
        interval=interval,
        anchor=anchor.value,
        branches=branches,
    )


@schedule_app.command("deep-cache")
def deep_cache(
    evaluations: _Evaluations,
    out: _Out,
    computed: Annotated[int, typer.Option(metavar="N", min=1, help="How many evaluations compute.")],
    center: Annotated[int, typer.Option(metavar="E", help="The evaluation around which they lie densest.")] = 15,
    power: Annotated[float, typer.Option(metavar="P", help="How dense, above 1.")] = 1.4,
    sites: _Sites = None,
    branches: _Branches = 1,
) -> None:
    """DeepCache's non-uniform setting, as its authors coded it."""
    from rich.console import Console

    from l2c_compile.cli.schedule_files import write_deep_cache

    write_deep_cache(
        out,
        Console(),
        num_evaluations=evaluations,
        sites=sites or _SUBLAYERS,
        num_computed=computed,
        center=center,
        power=power,
        branches=branches,
    )
