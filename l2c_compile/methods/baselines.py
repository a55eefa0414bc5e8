"""What every method has to beat: sites reused at random, and fewer steps."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from l2c_compile.errors import LoopError
from l2c_compile.finders.budget import within_budget
from l2c_compile.finders.work import Work
from l2c_compile.loops import BuiltInLoop, DPMSolver
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site, as_site

_BuiltIn = TypeVar("_BuiltIn", bound=BuiltInLoop)


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
        num_evaluations: how often the loop calls the denoiser.
        sites: what may be reused; none may contain another.
        budget: the share, in (0, 1], that is computed at least: of the multiply-adds in ``work``, else of the entries.
            Less than one entry is computed beyond it, unless all that may be reused is.
        seed: the seed of the draw.
        among: the evaluations that may reuse; None takes all but the first of each branch. ``alternate_evaluations``
            is the setting of Learning-to-Cache.
        work: the prices of evaluations and sites.
        branches: evaluations e with equal ``e % branches`` share caches; each entry is drawn by itself.
        loop: the description of the loop to store.

    Raises:
        ScheduleError: if the budget is out of range, or ``among`` names a first evaluation.
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


def fewer_steps(loop: _BuiltIn, share: float) -> _BuiltIn:
    """Return the loop with fewer steps: the baseline that every caching method has to beat.

    It needs no caching, so run it with ``CacheSchedule.all_compute(loop.num_evaluations)``.

    Args:
        loop: one of ``l2c_compile.loops``.
        share: the share of the evaluations to keep, in (0, 1]; rounded up to whole steps.

    Raises:
        LoopError: if the loop cannot be that short.
    """
    if not 0 < share <= 1:
        raise LoopError(f"a share of the steps wants a number in (0, 1], got {share!r}")
    name = "evaluations" if isinstance(loop, DPMSolver) else "steps"
    settings: dict[str, Any] = {name: max(1, math.ceil(share * getattr(loop, name) - 1e-9))}
    return replace(loop, **settings)
