"""MagCache: reuse the change of the whole stack while its magnitude is predicted to stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from l2c_compile.errors import ProfileError, ScheduleError
from l2c_compile.finders.profile import Profile
from l2c_compile.finders.selecting import check_parameter, columns_of, decided_schedule
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site


def mag_cache(
    profile: Profile,
    threshold: float,
    *,
    max_skip: int = 3,
    retention: float = 0.2,
    sites: Iterable[Site | str] | None = None,
) -> CacheSchedule:
    """Select as MagCache does (arXiv 2506.09045, algorithm 1): reuse while the magnitude is predicted to stay.

    Args:
        profile: any. The magnitude ratios are the means over its runs; the authors calibrate on one.
        threshold: the most that the predicted errors may add up to.
        max_skip: the most reuses in a row.
        retention: the share of evaluations computed at the start.
        sites: what to decide about, each by itself; None takes every change (``delta(...)``) in the profile. The
            authors' is that of the whole stack.

    Raises:
        ProfileError: if ``sites`` is None and the profile holds no change.
        UnknownSiteError: if it does not hold one of the sites.
        ScheduleError: if a parameter makes no sense.
    """
    if sites is None:
        sites = [site for site in profile.sites if site.kind == "delta"]
        if not sites:
            raise ProfileError(
                "mag_cache wants a change such as delta(blocks.0..blocks.27) in the profile, which holds none; profile "
                "one, or name the sites"
            )
    growth_ES = profile.growth.double().mean(0)

    def decide(branch: slice, group: list[Site]) -> list[int]:
        return mag_cache_row(
            growth_ES[branch, profile.sites.index(group[0])].tolist(), threshold, max_skip=max_skip, retention=retention
        )

    info = {"method": "MagCache", "threshold": threshold, "max_skip": max_skip, "retention": retention}
    return decided_schedule(profile, [[site] for site in columns_of(profile, sites)], decide, info)


def mag_cache_row(ratios: Sequence[float], threshold: float, *, max_skip: int = 3, retention: float = 0.2) -> list[int]:
    """Return MagCache's row for the magnitude ratios of one site: 1 compute, 0 reuse; see ``mag_cache``.

    Raises:
        ScheduleError: if a parameter makes no sense.
    """
    check_parameter("threshold", threshold)
    if type(max_skip) is not int or max_skip < 0 or not 0 <= retention <= 1:
        raise ScheduleError(f"max_skip wants a count and retention a share, got {max_skip!r} and {retention!r}")
    row = []
    first = max(1, int(retention * len(ratios) + 0.5))
    product, error, skipped = 1.0, 0.0, 0
    for e, ratio in enumerate(ratios):
        product, skipped = product * ratio, skipped + 1
        error += abs(1.0 - product)
        if e >= first and error <= threshold and skipped <= max_skip:
            row.append(0)
        else:
            row.append(1)
            product, error, skipped = 1.0, 0.0, 0
    return row
