"""The published methods, one short file each."""

from l2c_compile.methods.baselines import fewer_steps, random_reuse
from l2c_compile.methods.block_caching import block_caching
from l2c_compile.methods.deep_cache import deep_cache
from l2c_compile.methods.fora import uniform_interval
from l2c_compile.methods.harmonica import RolloutSettings, learn_rollout
from l2c_compile.methods.invar_diff import invar_diff
from l2c_compile.methods.learning_to_cache import L2CSettings, alternating_pairs, learn_l2c, published_pairs
from l2c_compile.methods.mag_cache import mag_cache
from l2c_compile.methods.pairwise import pairwise
from l2c_compile.methods.smooth_cache import smooth_cache

__all__ = [
    "L2CSettings",
    "RolloutSettings",
    "alternating_pairs",
    "block_caching",
    "deep_cache",
    "fewer_steps",
    "invar_diff",
    "learn_l2c",
    "learn_rollout",
    "mag_cache",
    "pairwise",
    "published_pairs",
    "random_reuse",
    "smooth_cache",
    "uniform_interval",
]
