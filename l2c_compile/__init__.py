"""l2c_compile: compile the sampling loop of a diffusion model, caches included, into one static graph."""

from l2c_compile.compile_cache import cache_folder_named
from l2c_compile.errors import L2CError

with cache_folder_named():  # Dynamo makes the folder when it is imported
    from l2c_compile.api import CompiledSampler, l2c_compile
from l2c_compile.importers import load_schedule_file
from l2c_compile.reference import run_reference
from l2c_compile.router import Router
from l2c_compile.rules import HOLD, Hold, Rule
from l2c_compile.saved import LoadedSampler, load
from l2c_compile.schedule import CacheSchedule, Reuse
from l2c_compile.sites import Site

__all__ = [
    "HOLD",
    "CacheSchedule",
    "CompiledSampler",
    "Hold",
    "L2CError",
    "LoadedSampler",
    "Reuse",
    "Router",
    "Rule",
    "Site",
    "l2c_compile",
    "load",
    "load_schedule_file",
    "run_reference",
]
