"""Profiles of a few numbers that are chosen, not measured."""

from __future__ import annotations

import torch
from torch import Tensor

from l2c_compile.finders.profile import Profile
from l2c_compile.finders.work import Work
from l2c_compile.schedules.sites import Site


def profile_of(
    values: Tensor, sites: tuple[str, ...] = ("blocks.0.attn",), *, lags: int = 3, branches: int = 1
) -> Profile:
    """Return the profile of sites that hold one number each, with values of shape (R, E, S)."""
    values = values.float()
    num_runs, num_evaluations, num_sites = values.shape
    change = torch.zeros(num_runs, lags, num_evaluations, num_sites)
    for k in range(1, lags + 1):
        lag = k * branches
        change[:, k - 1, lag:] = (values[:, lag:] - values[:, :-lag]).abs() if lag < num_evaluations else 0
    growth = torch.ones_like(values)
    growth[:, branches:] = values[:, branches:].abs() / values[:, :-branches].abs().clamp_min(1e-8)
    parsed = tuple(map(Site.parse, sites))
    work = Work((100,) * num_evaluations, dict.fromkeys(parsed, (90 // num_sites,) * num_evaluations))
    return Profile(change, values.abs(), growth, work, parsed, branches)


def one_site(*values: float, lags: int = 3) -> Profile:
    return profile_of(torch.tensor(values)[None, :, None], lags=lags)
