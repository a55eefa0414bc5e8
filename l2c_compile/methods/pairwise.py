"""The setting of Learning-to-Cache with measured errors: reuse the smallest ones in alternate evaluations."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

import torch
from torch import Tensor

from l2c_compile.errors import ScheduleError
from l2c_compile.finders.budget import within_budget
from l2c_compile.finders.formulas import alternate_evaluations
from l2c_compile.finders.profile import Profile
from l2c_compile.finders.selecting import INVARDIFF_EPS, columns_of, safe_ratio
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

ErrorOf = Literal["smooth-cache", "block-caching", "invar-diff", "mag-cache"]
"""Whose statistic at lag 1 says what a reuse costs."""


def pairwise(
    profile: Profile,
    error: ErrorOf,
    budget: float,
    *,
    among: Collection[int] | None = None,
    sites: Iterable[Site | str] | None = None,
) -> CacheSchedule:
    """Select in the setting of Learning-to-Cache: only alternate evaluations reuse, always from the one before.

    Of all entries allowed there, those with the smallest error are reused until the budget is met. This is what the
    statistic of a method is worth where a learned router has no more freedom than it.

    Args:
        profile: any.
        error: whose statistic is the error of reusing at e what e - 1 computed: relative change over the later value
            (SmoothCache) or the earlier (Block Caching), rate of change at e (InvarDiff; the last evaluation has none
            and is computed), distance of the magnitude ratio from 1 (MagCache).
        budget: the share of the multiply-adds that is kept at least; by less than one entry more.
        among: the evaluations that may reuse, no two of them in a row; None takes ``alternate_evaluations``.
        sites: what to decide about; None takes every site of the profile that contains no other.

    Raises:
        UnknownSiteError: if the profile does not hold one of the sites.
        ScheduleError: if the budget is out of range, or evaluations in ``among`` follow one another.
    """
    branches = profile.branches
    columns = columns_of(profile, sites)
    allowed = alternate_evaluations(profile.num_evaluations, branches=branches) if among is None else sorted(among)
    if any(e - branches in allowed or not branches <= e < profile.num_evaluations for e in allowed):
        raise ScheduleError("among wants evaluations that each follow one that computes; leave out every second")
    errors_ES = _errors(profile, error)
    ranked = sorted(
        (errors_ES[e, s].item(), e, s) for e in allowed for s in (profile.sites.index(site) for site in columns)
    )
    entries = [(e, profile.sites[s]) for value, e, s in ranked if value < float("inf")]
    return within_budget(
        profile.num_evaluations,
        columns,
        entries,
        budget,
        work=profile.work,
        cacheable=allowed,
        branches=branches,
        loop=profile.loop,
        info={"method": f"smallest error of {error} in pairs", "budget": budget},
    )


def _errors(profile: Profile, error: ErrorOf) -> Tensor:
    """Return the error of reusing at e what e - 1 computed, (E, S) over all branches; infinite where undefined."""
    steps = profile.branches
    change = profile.change[:, 0].double()
    errors_ES = torch.full(change.shape[1:], float("inf"), dtype=torch.float64)
    if error == "smooth-cache":
        errors_ES[steps:] = profile.relative_change(1)[steps:]
    elif error == "block-caching":
        errors_ES[steps:] = safe_ratio(change[:, steps:], profile.size[:, :-steps].double()).mean(0)
    elif error == "mag-cache":
        errors_ES[steps:] = (1.0 - profile.growth.double().mean(0)[steps:]).abs()
    elif error == "invar-diff":
        errors_ES[steps:-steps] = (
            (change[:, 2 * steps :] + INVARDIFF_EPS) / (change[:, steps:-steps] + INVARDIFF_EPS)
        ).mean(0)
    else:
        raise ScheduleError(f"error wants smooth-cache, block-caching, invar-diff or mag-cache, got {error!r}")
    return errors_ES
