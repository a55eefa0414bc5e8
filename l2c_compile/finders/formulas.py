"""Schedules from formulas: nothing is measured, nothing is learned.

With ``branches`` > 1 the formulas count network evaluations: all branches of one make the same decisions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from l2c_compile.errors import ScheduleError
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site, as_site


def alternate_evaluations(num_evaluations: int, *, first: int = 1, branches: int = 1) -> list[int]:
    """Return every second evaluation: those that may reuse in the pairs of Learning-to-Cache (arXiv 2406.01733).

    Each follows a full evaluation, so that what is reused is always one evaluation old.

    Args:
        num_evaluations: how often the loop calls the denoiser.
        first: the first that may reuse: 1 for DDIM, 2 for DPM-Solver-2 (the first evaluation of each step but step 0).
        branches: 2 for guidance in two separate calls; evaluations e with equal ``e % branches`` share caches.
    """
    count = per_branch(num_evaluations, branches)
    return [branches * n + branch for n in range(first, count, 2) for branch in range(branches)]


def all_sites(
    num_evaluations: int,
    sites: Iterable[Site | str],
    computed: Collection[int],
    branches: int,
    loop: Mapping[str, object] | None,
    info: Mapping[str, object],
) -> CacheSchedule:
    """Return the schedule that computes all sites in the given evaluations of each branch and holds them in between."""
    row = [int(e // branches in computed) for e in range(num_evaluations)]
    return CacheSchedule.from_table({as_site(site): row for site in sites}, branches=branches, loop=loop, info=info)


def per_branch(num_evaluations: int, branches: int) -> int:
    """Return how many evaluations each branch of guidance has.

    Raises:
        ScheduleError: if the branches do not divide the evaluations.
    """
    if type(branches) is not int or branches < 1 or num_evaluations % branches:
        raise ScheduleError(f"{num_evaluations} evaluations do not divide into branches of {branches!r}")
    return num_evaluations // branches
