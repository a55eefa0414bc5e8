"""InvarDiff: reuse the whole stack, or its sites, where their change slows down most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from l2c_compile.errors import ProfileError, ScheduleError
from l2c_compile.finders.profile import Profile
from l2c_compile.finders.selecting import INVARDIFF_EPS, branches_in, columns_of, types_of
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

INVARDIFF_WHOLE_QUANTILE = 0.63
INVARDIFF_QUANTILE = 0.22
"""The settings of InvarDiff's "fast" books for DiT."""


def invar_diff(
    profile: Profile,
    quantile: float = INVARDIFF_QUANTILE,
    whole_quantile: float | None = None,
    *,
    full_share: float = 0.0,
    corrected: bool = True,
    sites: Iterable[Site | str] | None = None,
    whole: Site | str | None = None,
) -> CacheSchedule:
    """Select as InvarDiff does (arXiv 2512.05134): reuse where the change slows down most.

    The rate at e is |v_(e+1) - v_e|_1 / |v_e - v_(e-1)|_1, the mean over the runs. Sites of one type reuse where it is
    below their quantile. In the second pass ("resampling correction") the values compared are those a cached run would
    have seen: within a run of reuses they stay at its first. All sites are computed after each reuse of the whole.

    Args:
        profile: a profile with lags as long as the longest reuse, plus 1.
        quantile: the quantile of the sites' rates, 0 (nothing is reused) to 1; the authors' "fast" setting.
        whole_quantile: the quantile of the whole stack's rates; None leaves the whole alone. The authors' "fast"
            setting is 0.63.
        full_share: the share of evaluations computed at the start; at least one is, and so is the last.
        corrected: whether to take the second pass.
        sites: what to decide about; None takes every site of the profile that contains no other.
        whole: the site that contains them all; None takes the profile's, a run such as ``blocks.0..blocks.27``.

    Raises:
        ProfileError: if the profile holds no whole, or not the lags that the second pass compares.
        UnknownSiteError: if it does not hold one of the sites.
        ScheduleError: if a parameter makes no sense.
    """
    for name, value in (("quantile", quantile), ("whole_quantile", whole_quantile), ("full_share", full_share)):
        if value is not None and not 0 <= value <= 1:
            raise ScheduleError(f"{name} wants a number in [0, 1], got {value!r}")
    columns = columns_of(profile, sites)
    quantiles = {tuple(group): quantile for group in types_of(columns)}
    if whole_quantile is not None:
        quantiles[_whole(profile, whole, columns),] = whole_quantile
    rows: dict[Site, list[int]] = {site: [1] * profile.num_evaluations for group in quantiles for site in group}
    for branch in branches_in(profile):
        for group, share in quantiles.items():
            for site, row in zip(
                group, _rates_below(profile, branch, group, share, full_share, corrected), strict=True
            ):
                rows[site][branch] = row
    if whole_quantile is not None:
        _compute_after_whole(rows, _whole(profile, whole, columns), profile.branches)
    info = {"method": "InvarDiff", "quantile": quantile, "corrected": corrected}
    if whole_quantile is not None:
        info["whole_quantile"] = whole_quantile
    ordered = {site: rows[site] for site in sorted(rows, key=profile.sites.index)}
    return CacheSchedule.from_table(ordered, branches=profile.branches, loop=profile.loop, info=info)


def invar_diff_scaled(profile: Profile, strength: float) -> CacheSchedule:
    """Select as ``invar_diff`` does, with both quantiles in the proportion of the authors' "fast" setting.

    Args:
        profile: a profile with the whole stack among its sites.
        strength: the quantile of the whole, 0 (nothing is reused) to 1; theirs is 0.63.

    Raises:
        ProfileError: if ``invar_diff`` raises it.
        ScheduleError: if ``invar_diff`` raises it.
    """
    return invar_diff(profile, strength * INVARDIFF_QUANTILE / INVARDIFF_WHOLE_QUANTILE, strength)


def _rates_below(
    profile: Profile, branch: slice, group: tuple[Site, ...], quantile: float, full_share: float, corrected: bool
) -> list[list[int]]:
    """Return InvarDiff's rows of one branch for sites that share a threshold."""
    columns = [_distances(profile, branch, site) for site in group]
    count = len(range(profile.num_evaluations)[branch])
    first = max(1, int(full_share * count))
    reused = [[False] * count for _ in group]
    for second_pass in (False, True) if corrected else (False,):
        rates = torch.stack(
            [_rates(distance, row, count) for distance, row in zip(columns, reused, strict=True)]
            if second_pass
            else [_rates(distance, [False] * count, count) for distance in columns]
        )
        inner = rates[:, 1:-1]
        limit = torch.quantile(inner, quantile).item() if inner.numel() else 0.0
        reused = [[first <= e < count - 1 and rate < limit for e, rate in enumerate(row)] for row in rates.tolist()]
    return [[int(not value) for value in row] for row in reused]


def _distances(profile: Profile, branch: slice, site: Site) -> Callable[[int, int], Tensor]:
    """Return the function that gives |v_later - v_earlier|_1 in each run."""
    change_RKE = profile.change[:, :, branch, profile.sites.index(site)].double()

    def distance(later: int, earlier: int) -> Tensor:
        lag = later - earlier
        if lag > profile.num_lags:
            raise ProfileError(
                f"invar_diff compares site {site} over {lag} evaluations, the profile holds lags up to "
                f"{profile.num_lags}; profile with more lags, or leave the correction out"
            )
        return change_RKE[:, lag - 1, later]

    return distance


def _rates(distance: Callable[[int, int], Tensor], reused: Sequence[bool], count: int) -> Tensor:
    """Return the rate of each evaluation, 1 where there is none, given what the first pass reuses."""
    rates = torch.ones(count, dtype=torch.float64)
    before, now, in_run = 0, 1, False
    for e in range(2, count):
        rates[e - 1] = ((distance(e, now) + INVARDIFF_EPS) / (distance(now, before) + INVARDIFF_EPS)).mean()
        # Within a run of reuses only its first evaluation is moved on to.
        if not (reused[e - 1] and in_run):
            before, now, in_run = now, e, reused[e - 1]
    return rates


def _compute_after_whole(rows: dict[Site, list[int]], whole: Site, branches: int) -> None:
    for e, computed in enumerate(rows[whole]):
        if not computed:
            for site, row in rows.items():
                if site != whole:
                    row[e] = 0
                    row[e + branches] = 1


def _whole(profile: Profile, whole: Site | str | None, parts: Sequence[Site]) -> Site:
    if whole is not None:
        return columns_of(profile, [whole])[0]
    for site in profile.sites:
        if site.kind == "out" and all(site.covers(part) for part in parts):
            return site
    raise ProfileError(
        "whole_quantile wants a site that contains all others, such as blocks.0..blocks.27, in the profile, which "
        "holds none; profile one, or leave whole_quantile out"
    )
