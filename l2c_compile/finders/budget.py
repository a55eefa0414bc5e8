"""Schedules for a given amount of work, so that methods can be compared at equal cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from l2c_compile.errors import ScheduleError
from l2c_compile.finders.work import Work
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

_NUM_HALVINGS = 50
_HIGHEST = 2.0**40


@dataclass(frozen=True)
class Found:
    """The outcome of ``for_budget``."""

    schedule: CacheSchedule
    parameter: float
    """What the selector was given."""
    kept: float
    """The share of the multiply-adds that the schedule keeps, by ``Work``."""


def for_budget(
    select: Callable[[float], CacheSchedule], work: Work, budget: float, *, highest: float | None = None
) -> Found:
    """Find the parameter at which a selector keeps least, but no less than ``budget``, of the multiply-adds.

    Bisection between 0, where every selector computes everything, and a parameter that keeps too little. It is exact
    for selectors that compute less the larger their parameter is (``block_caching``). The others are nearly so
    (SmoothCache may jump past a cheap evaluation): there the best of what was tried is returned.

    Args:
        select: makes a schedule of a parameter from 0.
        work: prices.
        budget: the share of the multiply-adds to keep, in (0, 1].
        highest: the largest parameter that makes sense; None looks for one.

    Returns:
        The schedule. If even the largest parameter keeps more than the budget, the one of that.

    Raises:
        ScheduleError: if the budget is no such share.
    """
    check_budget(budget)

    def at(parameter: float) -> Found:
        schedule = select(parameter)
        return Found(schedule, parameter, work.kept(schedule))

    best = at(0.0)
    low, high = 0.0, 1.0 if highest is None else highest
    tried = at(high)
    while highest is None and tried.kept >= budget and high < _HIGHEST:
        best, low, high = min(best, tried, key=_kept), high, 2 * high
        tried = at(high)
    if tried.kept >= budget:
        return min(best, tried, key=_kept)
    for _ in range(_NUM_HALVINGS):
        tried = at((low + high) / 2)
        if tried.kept >= budget:
            best, low = min(best, tried, key=_kept), tried.parameter
        else:
            high = tried.parameter
    return best


def within_budget(
    num_evaluations: int,
    sites: Sequence[Site],
    entries: Iterable[tuple[int, Site]],
    budget: float,
    *,
    work: Work | None = None,
    cacheable: Iterable[int] = (),
    branches: int = 1,
    loop: Mapping[str, object] | None = None,
    info: Mapping[str, object] | None = None,
) -> CacheSchedule:
    """Return the schedule that reuses the first of ``entries``, up to the one that would leave less than the budget.

    Args:
        num_evaluations: how often the loop calls the denoiser.
        sites: the columns; none may contain another.
        entries: (evaluation, site) in the order in which they are given up.
        budget: the share, in (0, 1], of the multiply-adds in ``work``, else of the entries, that is kept at least.
        work: prices.
        cacheable: the evaluations that the method may reuse in.
        branches: evaluations e with equal ``e % branches`` share caches.
        loop: description of the loop to store.
        info: where the schedule comes from.

    Raises:
        ScheduleError: if the budget is no such share, or an entry has nothing to read.
    """
    check_budget(budget)
    total = num_evaluations * len(sites) if work is None else work.total
    # A share such as 0.9 is no binary number.
    left = (1.0 - budget) * total * (1 + 1e-12) + 1e-9
    rows = {site: [1] * num_evaluations for site in sites}
    for e, site in entries:
        left -= 1 if work is None else work.saved(e, site)
        if left < 0:
            break
        rows[site][e] = 0
    return CacheSchedule.from_table(rows, branches=branches, cacheable=cacheable, loop=loop, info=info)


def check_budget(budget: float) -> None:
    """Raise ``ScheduleError`` unless ``budget`` is a share in (0, 1]."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ScheduleError(f"a budget wants the share that is kept, in (0, 1], got {budget!r}")


def _kept(found: Found) -> float:
    return found.kept
