"""Finders: what makes a schedule for a denoiser and its loop: formulas, selectors over profiles, and training."""

from l2c_compile.finders.budget import Found, for_budget, within_budget
from l2c_compile.finders.formulas import (
    alternate_evaluations,
    deep_cache,
    fewer_steps,
    random_reuse,
    uniform_interval,
)
from l2c_compile.finders.learn import L2CSettings, LatentData, alternating_pairs, learn_l2c, published_pairs
from l2c_compile.finders.profile import Profile, take_profile
from l2c_compile.finders.rollout import RolloutSettings, learn_rollout
from l2c_compile.finders.select import block_caching, invar_diff, mag_cache, pairwise, smooth_cache
from l2c_compile.finders.work import Work

__all__ = [
    "Found",
    "L2CSettings",
    "LatentData",
    "Profile",
    "RolloutSettings",
    "Work",
    "alternate_evaluations",
    "alternating_pairs",
    "block_caching",
    "deep_cache",
    "fewer_steps",
    "for_budget",
    "invar_diff",
    "learn_l2c",
    "learn_rollout",
    "mag_cache",
    "pairwise",
    "published_pairs",
    "random_reuse",
    "smooth_cache",
    "take_profile",
    "uniform_interval",
    "within_budget",
]
