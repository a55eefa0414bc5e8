"""The bodies of ``l2c schedule``: from a profile, or a formula, to a schedule file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from l2c_compile.errors import ScheduleError
from l2c_compile.finders import Profile, Work, alternate_evaluations, for_budget
from l2c_compile.finders.selecting import leaf_sites
from l2c_compile.methods import deep_cache, pairwise, random_reuse, uniform_interval
from l2c_compile.methods.pairwise import ErrorOf
from l2c_compile.schedules.schedule import CacheSchedule

__all__ = ["write_deep_cache", "write_pairwise", "write_random", "write_selected", "write_uniform"]

_Path = str | os.PathLike[str]


def write_selected(
    out: _Path,
    console: Console,
    profile_path: _Path,
    select: Callable[[Profile, float], CacheSchedule],
    *,
    parameter: float | None,
    budget: float | None,
    name: str,
    highest: float | None = None,
) -> None:
    """Write the schedule that a selector makes of a profile.

    Args:
        out: The file, JSON.
        console: Where to print.
        profile_path: What ``l2c profile`` wrote.
        select: Makes a schedule of the profile and a parameter.
        parameter: The parameter, or None.
        budget: The share of the multiply-adds to keep, or None; exactly one of the two is given.
        name: What the parameter is called.
        highest: The largest parameter that makes sense, if there is one.

    Raises:
        L2CError: The profile cannot be read or does not hold what is needed, or not exactly one of the two is given.
        OSError: A file cannot be read or written.
    """
    if (parameter is None) == (budget is None):
        raise ScheduleError(f"give either --{name.replace('_', '-')} or --budget")
    profile = Profile.load(profile_path)
    if parameter is None:
        assert budget is not None
        found = for_budget(lambda value: select(profile, value), profile.work, budget, highest=highest)
        console.print(Text(f"{name} {found.parameter:.6g} keeps {found.kept:.2%}, wanted {budget:.2%}"), soft_wrap=True)
        schedule = found.schedule
    else:
        schedule = select(profile, parameter)
    _write(schedule, out, console, profile.work)


def write_pairwise(out: _Path, console: Console, profile_path: _Path, *, error: ErrorOf, budget: float) -> None:
    """Write the schedule of ``pairwise``; see ``write_selected``."""
    profile = Profile.load(profile_path)
    _write(pairwise(profile, error, budget), out, console, profile.work)


def write_random(out: _Path, console: Console, profile_path: _Path, *, budget: float, seed: int, pairs: bool) -> None:
    """Write a schedule that reuses sites of a profile at random, down to a share of the multiply-adds."""
    profile = Profile.load(profile_path)
    among = alternate_evaluations(profile.num_evaluations, branches=profile.branches) if pairs else None
    schedule = random_reuse(
        profile.num_evaluations,
        leaf_sites(profile),
        budget,
        seed=seed,
        among=among,
        work=profile.work,
        branches=profile.branches,
        loop=profile.loop,
    )
    _write(schedule, out, console, profile.work)


def write_uniform(
    out: _Path,
    console: Console,
    *,
    num_evaluations: int,
    sites: Sequence[str],
    interval: int,
    anchor: Literal["start", "end"],
    branches: int,
) -> None:
    """Write the schedule of ``uniform_interval``."""
    schedule = uniform_interval(num_evaluations, sites, interval, anchor=anchor, branches=branches)
    _write(schedule, out, console)


def write_deep_cache(
    out: _Path,
    console: Console,
    *,
    num_evaluations: int,
    sites: Sequence[str],
    num_computed: int,
    center: int,
    power: float,
    branches: int,
) -> None:
    """Write DeepCache's non-uniform schedule."""
    schedule = deep_cache(num_evaluations, sites, num_computed, center=center, power=power, branches=branches)
    _write(schedule, out, console)


def _write(schedule: CacheSchedule, out: _Path, console: Console, work: Work | None = None) -> None:
    schedule.save(out)
    kept = "" if work is None else f", about {work.kept(schedule):.2%} of the multiply-adds kept"
    console.print(
        Text(f"{schedule.computed_share():.2%} of the entries computed{kept}; written to {Path(out)}"), soft_wrap=True
    )
