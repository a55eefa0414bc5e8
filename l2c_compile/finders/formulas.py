"""Schedules from formulas: nothing is measured, nothing is learned.

With ``branches`` > 1 the formulas count network evaluations: all branches of one make the same decisions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

from l2c_compile.errors import LoopError, ScheduleError
from l2c_compile.finders.budget import within_budget
from l2c_compile.finders.work import Work
from l2c_compile.loops import DPMSolver
from l2c_compile.loops import Loop as BuiltInLoop
from l2c_compile.schedule import CacheSchedule
from l2c_compile.sites import Site, as_site

__all__ = ["alternate_evaluations", "deep_cache", "fewer_steps", "random_reuse", "uniform_interval"]

_BuiltIn = TypeVar("_BuiltIn", bound=BuiltInLoop)


def uniform_interval(
    num_evaluations: int,
    sites: Iterable[Site | str],
    interval: int,
    *,
    anchor: Literal["start", "end"] = "start",
    branches: int = 1,
    loop: Mapping[str, object] | None = None,
) -> CacheSchedule:
    """Return the schedule that computes all sites in every ``interval``-th evaluation.

    FORA (arXiv 2407.01425) and DeepCache's uniform setting (arXiv 2312.00858).

    Args:
        num_evaluations: of the loop.
        sites: what is reused in between.
        interval: 1 computes everything.
        anchor: "start" computes evaluations e with e % interval == 0 (DeepCache). "end" is FORA as its authors coded
            it: counted from the clean end, idx = E - 1 - e, computed where idx % interval == 0, and the first.
        branches: see the module.
        loop: description of the loop to store.

    Raises:
        ScheduleError: the interval is below 1, or the branches do not divide the evaluations.
    """
    if type(interval) is not int or interval < 1:
        raise ScheduleError(f"an interval wants a whole number from 1, got {interval!r}")
    count = _per_branch(num_evaluations, branches)
    origin = 0 if anchor == "start" else count - 1
    computed = {n for n in range(count) if (n - origin) % interval == 0 or n == 0}
    info = {"method": "uniform interval", "interval": interval, "anchor": anchor}
    return _all_sites(num_evaluations, sites, computed, branches, loop, info)


def deep_cache(
    num_evaluations: int,
    sites: Iterable[Site | str],
    num_computed: int,
    *,
    center: int = 15,
    power: float = 1.4,
    branches: int = 1,
    loop: Mapping[str, object] | None = None,
) -> CacheSchedule:
    """Return DeepCache's non-uniform schedule (arXiv 2312.00858, section 3.3): dense around ``center``.

    As coded: the fractional powers have negative bases, and of the complex results only the real part is kept. That is
    not the sign-preserving map it looks like, but published numbers were made with it.

    Args:
        num_evaluations: of the loop.
        sites: what is reused in between.
        num_computed: how many evaluations compute it.
        center: the evaluation around which they lie densest.
        power: the larger the denser, above 1; lowered by 0.02 until all computed evaluations differ.
        branches: see the module.
        loop: description of the loop to store.

    Raises:
        ScheduleError: ``num_computed`` is not from 1 to the number of evaluations, or no power gives so many.
    """
    count = _per_branch(num_evaluations, branches)
    if type(num_computed) is not int or not 1 <= num_computed <= count:
        raise ScheduleError(f"num_computed wants a whole number from 1 to {count}, got {num_computed!r}")
    tried = power
    while tried > 1:
        computed = _power_spaced(count, num_computed, center, tried)
        if len(computed) == num_computed:
            info = {"method": "DeepCache", "center": center, "power": power}
            return _all_sites(num_evaluations, sites, computed, branches, loop, info)
        tried -= 0.02
    raise ScheduleError(
        f"no power from 1 to {power} gives {num_computed} different evaluations of {count} around {center}; choose "
        "another center"
    )


def random_reuse(
    num_evaluations: int,
    sites: Iterable[Site | str],
    budget: float,
    *,
    seed: int,
    among: Collection[int] | None = None,
    work: Work | None = None,
    branches: int = 1,
    loop: Mapping[str, object] | None = None,
) -> CacheSchedule:
    """Return a schedule that reuses entries drawn at random, as many as the budget allows.

    Args:
        num_evaluations: of the loop.
        sites: what may be reused; none may contain another.
        budget: the share, in (0, 1], that is computed at least: of the multiply-adds in ``work``, else of the entries.
            Less than one entry is computed beyond it, unless all that may be reused is.
        seed: of the draw.
        among: the evaluations that may reuse; None takes all but the first of each branch. ``alternate_evaluations``
            is the setting of Learning-to-Cache.
        work: prices.
        branches: evaluations e with equal ``e % branches`` share caches; each entry is drawn by itself.
        loop: description of the loop to store.

    Raises:
        ScheduleError: the budget is out of range, or ``among`` names a first evaluation.
    """
    columns = tuple(map(as_site, sites))
    allowed = range(branches, num_evaluations) if among is None else among
    entries = [(e, site) for e in sorted(allowed) for site in columns]
    random.Random(seed).shuffle(entries)
    info = {"method": "random", "budget": budget, "seed": seed}
    return within_budget(
        num_evaluations,
        columns,
        entries,
        budget,
        work=work,
        cacheable=allowed,
        branches=branches,
        loop=loop,
        info=info,
    )


def alternate_evaluations(num_evaluations: int, *, first: int = 1, branches: int = 1) -> list[int]:
    """Return every second evaluation: those that may reuse in the pairs of Learning-to-Cache (arXiv 2406.01733).

    Each follows a full evaluation, so that what is reused is always one evaluation old.

    Args:
        num_evaluations: of the loop.
        first: the first that may reuse: 1 for DDIM, 2 for DPM-Solver-2 (the first evaluation of each step but step 0).
        branches: see the module.
    """
    count = _per_branch(num_evaluations, branches)
    return [branches * n + branch for n in range(first, count, 2) for branch in range(branches)]


def fewer_steps(loop: _BuiltIn, share: float) -> _BuiltIn:
    """Return the loop with fewer steps: the baseline that every caching method has to beat.

    It needs no caching, so run it with ``CacheSchedule.all_compute(loop.num_evaluations)``.

    Args:
        loop: one of ``l2c_compile.loops``.
        share: the share of the evaluations to keep, in (0, 1]; rounded up to whole steps.

    Raises:
        LoopError: the loop cannot be that short.
    """
    if not 0 < share <= 1:
        raise LoopError(f"a share of the steps wants a number in (0, 1], got {share!r}")
    name = "evaluations" if isinstance(loop, DPMSolver) else "steps"
    settings: dict[str, Any] = {name: max(1, math.ceil(share * getattr(loop, name) - 1e-9))}
    return replace(loop, **settings)


def _power_spaced(count: int, num_computed: int, center: int, power: float) -> set[int]:
    low, high = (complex(edge) ** (1 / power) for edge in (-center, count - center))
    points = (low + (high - low) * j / num_computed for j in range(num_computed + 1))
    # Cut off towards zero before the center is added, as a cast to integers does.
    offsets = sorted({int((point**power).real) for point in points})
    return {0, *(offset + center for offset in offsets[1:-1])}


def _all_sites(
    num_evaluations: int,
    sites: Iterable[Site | str],
    computed: Collection[int],
    branches: int,
    loop: Mapping[str, object] | None,
    info: Mapping[str, object],
) -> CacheSchedule:
    row = [int(e // branches in computed) for e in range(num_evaluations)]
    return CacheSchedule.from_table({as_site(site): row for site in sites}, branches=branches, loop=loop, info=info)


def _per_branch(num_evaluations: int, branches: int) -> int:
    if type(branches) is not int or branches < 1 or num_evaluations % branches:
        raise ScheduleError(f"{num_evaluations} evaluations do not divide into branches of {branches!r}")
    return num_evaluations // branches
