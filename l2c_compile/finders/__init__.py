"""Finders: what produces a schedule. Formulas; profiles and the selectors over them."""

from l2c_compile.finders.budget import Found, for_budget, within_budget
from l2c_compile.finders.formulas import (
    alternate_evaluations,
    deep_cache,
    fewer_steps,
    random_reuse,
    uniform_interval,
)
from l2c_compile.finders.profile import Profile, take_profile
from l2c_compile.finders.select import block_caching, invar_diff, mag_cache, pairwise, smooth_cache
from l2c_compile.finders.work import Work

__all__ = [
    "Found",
    "Profile",
    "Work",
    "alternate_evaluations",
    "block_caching",
    "deep_cache",
    "fewer_steps",
    "for_budget",
    "invar_diff",
    "mag_cache",
    "pairwise",
    "random_reuse",
    "smooth_cache",
    "take_profile",
    "uniform_interval",
    "within_budget",
]
