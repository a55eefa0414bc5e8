"""Finders: what makes a schedule for a denoiser and its loop. All stand above ``l2c_compile.api``."""

from l2c_compile.finders.learn import L2CSettings, LatentData, alternating_pairs, learn_l2c, published_pairs
from l2c_compile.finders.rollout import RolloutSettings, learn_rollout

__all__ = [
    "L2CSettings",
    "LatentData",
    "RolloutSettings",
    "alternating_pairs",
    "learn_l2c",
    "learn_rollout",
    "published_pairs",
]
