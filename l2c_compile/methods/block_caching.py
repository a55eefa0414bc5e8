"""Block Caching: keep a value until its changes add up."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from l2c_compile.finders.profile import Profile
from l2c_compile.finders.selecting import check_parameter, columns_of, decided_schedule, safe_ratio
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site


def block_caching(profile: Profile, delta: float, *, sites: Iterable[Site | str] | None = None) -> CacheSchedule:
    """Select as Block Caching does (arXiv 2312.03209, section 3.2): keep a value until changes add up to ``delta``.

    The change at e is |v_e - v_(e+1)|_1 / |v_e|_1, the mean over the runs (give runs of batch 1). A value computed at a
    is kept while the changes from a to b, both counted, stay within ``delta``; b recomputes when they exceed it (eq. 7
    as printed). Each site is decided by itself.

    Args:
        profile: any.
        delta: how much change is allowed.
        sites: what to decide about; None takes every site of the profile that contains no other.

    Raises:
        UnknownSiteError: if the profile does not hold one of the sites.
        ScheduleError: if ``delta`` makes no sense.
    """
    check_parameter("delta", delta)
    steps = profile.branches
    # Of evaluation e, against the next of its branch.
    relative_ES = safe_ratio(profile.change[:, 0, steps:].double(), profile.size[:, :-steps].double()).mean(0)
    change_ES = torch.cat([relative_ES, torch.zeros(steps, len(profile.sites), dtype=torch.float64)])

    def decide(branch: slice, group: list[Site]) -> list[int]:
        row, total = [], float("inf")
        for change in change_ES[branch, profile.sites.index(group[0])].tolist():
            total += change
            if total > delta:
                row.append(1)
                total = change
            else:
                row.append(0)
        return row

    info = {"method": "Block Caching", "delta": delta}
    return decided_schedule(profile, [[site] for site in columns_of(profile, sites)], decide, info)
