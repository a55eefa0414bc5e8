"""DeepCache's non-uniform setting, as its authors coded it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from l2c_compile.errors import ScheduleError
from l2c_compile.finders.formulas import all_sites, per_branch
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site


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
        num_evaluations: how often the loop calls the denoiser.
        sites: what is reused in between.
        num_computed: how many evaluations compute it.
        center: the evaluation around which they lie densest.
        power: the larger the denser, above 1; lowered by 0.02 until all computed evaluations differ.
        branches: 2 for guidance in two separate calls; evaluations e with equal ``e % branches`` share caches.
        loop: description of the loop to store.

    Raises:
        ScheduleError: if ``num_computed`` is not from 1 to the number of evaluations, or no power gives so many.
    """
    count = per_branch(num_evaluations, branches)
    if type(num_computed) is not int or not 1 <= num_computed <= count:
        raise ScheduleError(f"num_computed wants a whole number from 1 to {count}, got {num_computed!r}")
    tried = power
    while tried > 1:
        computed = _power_spaced(count, num_computed, center, tried)
        if len(computed) == num_computed:
            info = {"method": "DeepCache", "center": center, "power": power}
            return all_sites(num_evaluations, sites, computed, branches, loop, info)
        tried -= 0.02
    raise ScheduleError(
        f"no power from 1 to {power} gives {num_computed} different evaluations of {count} around {center}; choose "
        "another center"
    )


def _power_spaced(count: int, num_computed: int, center: int, power: float) -> set[int]:
    low, high = (complex(edge) ** (1 / power) for edge in (-center, count - center))
    points = (low + (high - low) * j / num_computed for j in range(num_computed + 1))
    # Cut off towards zero before the center is added, as a cast to integers does.
    offsets = sorted({int((point**power).real) for point in points})
    return {0, *(offset + center for offset in offsets[1:-1])}
