"""Selectors: schedules from a profile. Pure functions; nothing is run, no model is needed.

Each follows its authors' code, with the places named where paper and code part. With branches (guidance in two calls)
every branch is decided by itself, from its own evaluations.

Shapes: E evaluations of one branch, S sites.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from l2c_compile.errors import ProfileError, ScheduleError, UnknownSiteError, nearest
from l2c_compile.finders.budget import within_budget
from l2c_compile.finders.formulas import alternate_evaluations
from l2c_compile.finders.profile import Profile
from l2c_compile.schedule import CacheSchedule
from l2c_compile.sites import Site, as_site

__all__ = [
    "ErrorOf",
    "block_caching",
    "invar_diff",
    "invar_diff_scaled",
    "leaf_sites",
    "mag_cache",
    "mag_cache_row",
    "pairwise",
    "smooth_cache",
]

ErrorOf = Literal["smooth-cache", "block-caching", "invar-diff", "mag-cache"]
"""Whose statistic at lag 1 says what a reuse costs."""

INVARDIFF_WHOLE_QUANTILE = 0.63
INVARDIFF_QUANTILE = 0.22
"""The settings of InvarDiff's "fast" books for DiT."""

_INVARDIFF_EPS = 1e-8


def leaf_sites(profile: Profile) -> tuple[Site, ...]:
    """Return the sites that selectors decide about by default: the outputs that contain no other site."""
    return tuple(
        site for site in profile.sites if site.kind == "out" and not any(site.covers(other) for other in profile.sites)
    )


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
        ProfileError: the profile does not hold these lags.
        UnknownSiteError: it does not hold one of the sites.
        ScheduleError: ``alpha`` or ``lookahead`` makes no sense.
    """
    _check_parameter("alpha", alpha)
    _check_lags(profile, lookahead, "smooth_cache")
    columns = _columns(profile, sites)
    groups = _types(columns) if by == "type" else [[site] for site in columns]
    errors = [profile.relative_change(k) for k in range(1, lookahead + 1)]

    def decide(branch: slice, group: list[Site]) -> list[int]:
        where = [profile.sites.index(site) for site in group]
        # Row k - 1, entry i: the error of what i computed, k evaluations later.
        rows = [errors[k][branch][:, where].mean(1)[k + 1 :].tolist() for k in range(lookahead)]
        return _jump(rows, alpha, len(errors[0][branch]))

    info = {"method": "SmoothCache", "alpha": alpha, "lookahead": lookahead, "by": by}
    return _decided(profile, groups, decide, info)


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
        UnknownSiteError: the profile does not hold one of the sites.
        ScheduleError: ``delta`` makes no sense.
    """
    _check_parameter("delta", delta)
    steps = profile.branches
    # Of evaluation e, against the next of its branch.
    relative_ES = _ratio(profile.change[:, 0, steps:].double(), profile.size[:, :-steps].double()).mean(0)
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
    return _decided(profile, [[site] for site in _columns(profile, sites)], decide, info)


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
        profile: with lags as long as the longest reuse, plus 1.
        quantile: of the sites' rates, 0 (nothing is reused) to 1; the authors' "fast" setting.
        whole_quantile: of the whole stack's rates; None leaves the whole alone. The authors' "fast" setting is 0.63.
        full_share: the share of evaluations computed at the start; at least one is, and so is the last.
        corrected: whether to take the second pass.
        sites: what to decide about; None takes every site of the profile that contains no other.
        whole: the site that contains them all; None takes the profile's, a run such as ``blocks.0..blocks.27``.

    Raises:
        ProfileError: the profile holds no whole, or not the lags that the second pass compares.
        UnknownSiteError: it does not hold one of the sites.
        ScheduleError: a parameter makes no sense.
    """
    for name, value in (("quantile", quantile), ("whole_quantile", whole_quantile), ("full_share", full_share)):
        if value is not None and not 0 <= value <= 1:
            raise ScheduleError(f"{name} wants a number in [0, 1], got {value!r}")
    columns = _columns(profile, sites)
    quantiles = {tuple(group): quantile for group in _types(columns)}
    if whole_quantile is not None:
        quantiles[_whole(profile, whole, columns),] = whole_quantile
    rows: dict[Site, list[int]] = {site: [1] * profile.num_evaluations for group in quantiles for site in group}
    for branch in _branches(profile):
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
        profile: with the whole stack among its sites.
        strength: the quantile of the whole, 0 (nothing is reused) to 1; theirs is 0.63.

    Raises:
        ProfileError, ScheduleError: see ``invar_diff``.
    """
    return invar_diff(profile, strength * INVARDIFF_QUANTILE / INVARDIFF_WHOLE_QUANTILE, strength)


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
        ProfileError: ``sites`` is None and the profile holds no change.
        UnknownSiteError: it does not hold one of the sites.
        ScheduleError: a parameter makes no sense.
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
    return _decided(profile, [[site] for site in _columns(profile, sites)], decide, info)


def mag_cache_row(ratios: Sequence[float], threshold: float, *, max_skip: int = 3, retention: float = 0.2) -> list[int]:
    """Return MagCache's row for the magnitude ratios of one site: 1 compute, 0 reuse; see ``mag_cache``.

    Raises:
        ScheduleError: a parameter makes no sense.
    """
    _check_parameter("threshold", threshold)
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


def pairwise(
    profile: Profile,
    error: ErrorOf,
    budget: float,
    *,
    among: Collection[int] | None = None,
    sites: Iterable[Site | str] | None = None,
) -> CacheSchedule:
    """Select in the setting of Learning-to-Cache: only alternate evaluations reuse, always from the one before.

    Of all entries allowed there, those with the smallest error are reused until the budget is met. This is what the
    statistic of a method is worth where a learned router has no more freedom than it.

    Args:
        profile: any.
        error: whose statistic is the error of reusing at e what e - 1 computed: relative change over the later value
            (SmoothCache) or the earlier (Block Caching), rate of change at e (InvarDiff; the last evaluation has none
            and is computed), distance of the magnitude ratio from 1 (MagCache).
        budget: the share of the multiply-adds that is kept at least; by less than one entry more.
        among: the evaluations that may reuse, no two of them in a row; None takes ``alternate_evaluations``.
        sites: what to decide about; None takes every site of the profile that contains no other.

    Raises:
        UnknownSiteError: the profile does not hold one of the sites.
        ScheduleError: the budget is out of range, or evaluations in ``among`` follow one another.
    """
    branches = profile.branches
    columns = _columns(profile, sites)
    allowed = alternate_evaluations(profile.num_evaluations, branches=branches) if among is None else sorted(among)
    if any(e - branches in allowed or not branches <= e < profile.num_evaluations for e in allowed):
        raise ScheduleError("among wants evaluations that each follow one that computes; leave out every second")
    errors_ES = _errors(profile, error)
    ranked = sorted(
        (errors_ES[e, s].item(), e, s) for e in allowed for s in (profile.sites.index(site) for site in columns)
    )
    entries = [(e, profile.sites[s]) for value, e, s in ranked if value < float("inf")]
    return within_budget(
        profile.num_evaluations,
        columns,
        entries,
        budget,
        work=profile.work,
        cacheable=allowed,
        branches=branches,
        loop=profile.loop,
        info={"method": f"smallest error of {error} in pairs", "budget": budget},
    )


def _errors(profile: Profile, error: ErrorOf) -> Tensor:
    """Return the error of reusing at e what e - 1 computed, (E, S) over all branches; infinite where undefined."""
    steps = profile.branches
    change = profile.change[:, 0].double()
    errors_ES = torch.full(change.shape[1:], float("inf"), dtype=torch.float64)
    if error == "smooth-cache":
        errors_ES[steps:] = profile.relative_change(1)[steps:]
    elif error == "block-caching":
        errors_ES[steps:] = _ratio(change[:, steps:], profile.size[:, :-steps].double()).mean(0)
    elif error == "mag-cache":
        errors_ES[steps:] = (1.0 - profile.growth.double().mean(0)[steps:]).abs()
    elif error == "invar-diff":
        errors_ES[steps:-steps] = (
            (change[:, 2 * steps :] + _INVARDIFF_EPS) / (change[:, steps:-steps] + _INVARDIFF_EPS)
        ).mean(0)
    else:
        raise ScheduleError(f"error wants smooth-cache, block-caching, invar-diff or mag-cache, got {error!r}")
    return errors_ES


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
        rates[e - 1] = ((distance(e, now) + _INVARDIFF_EPS) / (distance(now, before) + _INVARDIFF_EPS)).mean()
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


def _decided(
    profile: Profile,
    groups: Sequence[list[Site]],
    decide: Callable[[slice, list[Site]], list[int]],
    info: dict[str, object],
) -> CacheSchedule:
    """Return the schedule in which the sites of each group share a row, decided branch by branch."""
    rows: dict[Site, list[int]] = {}
    for group in groups:
        row = [1] * profile.num_evaluations
        for branch in _branches(profile):
            row[branch] = decide(branch, group)
        rows.update((site, row) for site in group)
    ordered = {site: rows[site] for site in sorted(rows, key=profile.sites.index)}
    return CacheSchedule.from_table(ordered, branches=profile.branches, loop=profile.loop, info=info)


def _branches(profile: Profile) -> list[slice]:
    return [slice(branch, None, profile.branches) for branch in range(profile.branches)]


def _columns(profile: Profile, sites: Iterable[Site | str] | None) -> tuple[Site, ...]:
    if sites is None:
        return leaf_sites(profile)
    columns = tuple(map(as_site, sites))
    for site in columns:
        if site not in profile.sites:
            raise UnknownSiteError(f"the profile has no site {site}. {nearest(str(site), map(str, profile.sites))}")
    return columns


def _whole(profile: Profile, whole: Site | str | None, parts: Sequence[Site]) -> Site:
    if whole is not None:
        return _columns(profile, [whole])[0]
    for site in profile.sites:
        if site.kind == "out" and all(site.covers(part) for part in parts):
            return site
    raise ProfileError(
        "whole_quantile wants a site that contains all others, such as blocks.0..blocks.27, in the profile, which "
        "holds none; profile one, or leave whole_quantile out"
    )


def _types(sites: Sequence[Site]) -> list[list[Site]]:
    """Return the sites by the last name of their path that is no number: ``attn``, ``mlp``."""
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        names = [name for name in site.path.split(".") if not name.isdigit()]
        groups.setdefault((site.kind, names[-1] if names else ""), []).append(site)
    return list(groups.values())


def _ratio(change: Tensor, size: Tensor) -> Tensor:
    """Return change over size: 0 where nothing changes, infinite where something came from nothing."""
    return torch.where(change == 0, 0.0, change / size)


def _check_parameter(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ScheduleError(f"{name} wants a number from 0, got {value!r}")


def _check_lags(profile: Profile, wanted: int, who: str) -> None:
    if type(wanted) is not int or wanted < 1:
        raise ScheduleError(f"lookahead wants a whole number from 1, got {wanted!r}")
    if wanted > profile.num_lags:
        raise ProfileError(
            f"{who} wants lags 1..{wanted}, the profile holds 1..{profile.num_lags}; profile with more lags"
        )
