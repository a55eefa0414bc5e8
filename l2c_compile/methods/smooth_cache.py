"""SmoothCache: jump as far as the error at that lag allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from l2c_compile.errors import ProfileError, ScheduleError
from l2c_compile.finders.profile import Profile
from l2c_compile.finders.selecting import check_parameter, columns_of, decided_schedule, types_of
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site


def smooth_cache(
    profile: Profile,
    alpha: float,
    *,
    lookahead: int = 3,
    by: Literal["type", "site"] = "type",
    sites: Iterable[Site | str] | None = None,
) -> CacheSchedule:
    """Select as SmoothCache does (arXiv 2411.10510, section 3.2): jump as far as the error stays within ``alpha``.

    What evaluation i computed is reused k times, for the largest k <= ``lookahead`` with E_k[i] <= ``alpha``; smaller k
    are not looked at. E_k[i] = |v_i - v_(i+k)|_1 / |v_(i+k)|_1: as coded, the LATER value divides. Norms are summed
    over all runs, as over one batch. First and last evaluation are computed.

    Args:
        profile: with lags up to ``lookahead``.
        alpha: the largest relative error.
        lookahead: the longest reuse.
        by: "type" as published: sites with one last name (``attn``) share a row, from the mean of their errors; "site"
            gives each its own.
        sites: what to decide about; None takes every site of the profile that contains no other.

    Raises:
        ProfileError: if the profile does not hold these lags.
        UnknownSiteError: if it does not hold one of the sites.
        ScheduleError: if ``alpha`` or ``lookahead`` makes no sense.
    """
    check_parameter("alpha", alpha)
    _check_lags(profile, lookahead, "smooth_cache")
    columns = columns_of(profile, sites)
    groups = types_of(columns) if by == "type" else [[site] for site in columns]
    errors = [profile.relative_change(k) for k in range(1, lookahead + 1)]

    def decide(branch: slice, group: list[Site]) -> list[int]:
        where = [profile.sites.index(site) for site in group]
        # Row k - 1, entry i: the error of what i computed, k evaluations later.
        rows = [errors[k][branch][:, where].mean(1)[k + 1 :].tolist() for k in range(lookahead)]
        return _jump(rows, alpha, len(errors[0][branch]))

    info = {"method": "SmoothCache", "alpha": alpha, "lookahead": lookahead, "by": by}
    return decided_schedule(profile, groups, decide, info)


def _jump(errors: Sequence[Sequence[float]], alpha: float, count: int) -> list[int]:
    """Return SmoothCache's row: ``errors[k - 1][i]`` is the error of reusing at i + k what i computed."""
    row = [1] * count
    i = 0
    while i < count:
        reach = max((k for k, of_lag in enumerate(errors, 1) if i < len(of_lag) and of_lag[i] <= alpha), default=0)
        row[i + 1 : i + reach + 1] = [0] * reach
        i += reach + 1
    row[0] = row[-1] = 1
    return row


def _check_lags(profile: Profile, wanted: int, who: str) -> None:
    if type(wanted) is not int or wanted < 1:
        raise ScheduleError(f"lookahead wants a whole number from 1, got {wanted!r}")
    if wanted > profile.num_lags:
        raise ProfileError(
            f"{who} wants lags 1..{wanted}, the profile holds 1..{profile.num_lags}; profile with more lags"
        )
