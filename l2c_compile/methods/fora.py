"""FORA and DeepCache's uniform setting: compute in every N-th evaluation, reuse in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from l2c_compile.errors import ScheduleError
from l2c_compile.finders.formulas import all_sites, per_branch
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site


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
        num_evaluations: how often the loop calls the denoiser.
        sites: what is reused in between.
        interval: compute in every such evaluation; 1 computes everything.
        anchor: "start" computes evaluations e with e % interval == 0 (DeepCache). "end" is FORA as its authors coded
            it: counted from the clean end, idx = E - 1 - e, computed where idx % interval == 0, and the first.
        branches: 2 for guidance in two separate calls; evaluations e with equal ``e % branches`` share caches.
        loop: the description of the loop to store.

    Raises:
        ScheduleError: if the interval is below 1, or the branches do not divide the evaluations.
    """
    if type(interval) is not int or interval < 1:
        raise ScheduleError(f"an interval wants a whole number from 1, got {interval!r}")
    count = per_branch(num_evaluations, branches)
    origin = 0 if anchor == "start" else count - 1
    computed = {n for n in range(count) if (n - origin) % interval == 0 or n == 0}
    info = {"method": "uniform interval", "interval": interval, "anchor": anchor}
    return all_sites(num_evaluations, sites, computed, branches, loop, info)
