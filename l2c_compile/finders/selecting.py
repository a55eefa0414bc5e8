"""Selectors: schedules from a profile. Pure functions; nothing is run, no model is needed.

Each follows its authors' code, with the places named where paper and code part. With branches (guidance in two calls)
every branch is decided by itself, from its own evaluations.

Shapes: E evaluations of one branch, S sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from l2c_compile.errors import ScheduleError, UnknownSiteError, nearest
from l2c_compile.finders.profile import Profile
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site, as_site

INVARDIFF_EPS = 1e-8


def leaf_sites(profile: Profile) -> tuple[Site, ...]:
    """Return the sites that selectors decide about by default: the outputs that contain no other site."""
    return tuple(
        site for site in profile.sites if site.kind == "out" and not any(site.covers(other) for other in profile.sites)
    )


def decided_schedule(
    profile: Profile,
    groups: Sequence[list[Site]],
    decide: Callable[[slice, list[Site]], list[int]],
    info: dict[str, object],
) -> CacheSchedule:
    """Return the schedule in which the sites of each group share a row, decided branch by branch."""
    rows: dict[Site, list[int]] = {}
    for group in groups:
        row = [1] * profile.num_evaluations
        for branch in branches_in(profile):
            row[branch] = decide(branch, group)
        rows.update((site, row) for site in group)
    ordered = {site: rows[site] for site in sorted(rows, key=profile.sites.index)}
    return CacheSchedule.from_table(ordered, branches=profile.branches, loop=profile.loop, info=info)


def branches_in(profile: Profile) -> list[slice]:
    """Return the evaluations of each branch of guidance."""
    return [slice(branch, None, profile.branches) for branch in range(profile.branches)]


def columns_of(profile: Profile, sites: Iterable[Site | str] | None) -> tuple[Site, ...]:
    """Return the sites to decide about: those given, or all that contain no other.

    Raises:
        UnknownSiteError: if the profile has not measured one of them.
    """
    if sites is None:
        return leaf_sites(profile)
    columns = tuple(map(as_site, sites))
    for site in columns:
        if site not in profile.sites:
            raise UnknownSiteError(f"the profile has no site {site}. {nearest(str(site), map(str, profile.sites))}")
    return columns


def types_of(sites: Sequence[Site]) -> list[list[Site]]:
    """Return the sites by the last name of their path that is no number: ``attn``, ``mlp``."""
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        names = [name for name in site.path.split(".") if not name.isdigit()]
        groups.setdefault((site.kind, names[-1] if names else ""), []).append(site)
    return list(groups.values())


def safe_ratio(change: Tensor, size: Tensor) -> Tensor:
    """Return change over size: 0 where nothing changes, infinite where something came from nothing."""
    return torch.where(change == 0, 0.0, change / size)


def check_parameter(name: str, value: float) -> None:
    """Raise ScheduleError unless the value is a number from 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ScheduleError(f"{name} wants a number from 0, got {value!r}")
