"""l2c_compile: compile the sampling loop of a diffusion model, caches included, into one static graph."""

from l2c_compile.errors import L2CError
from l2c_compile.files.torch_cache import cache_folder_named

with cache_folder_named():  # Dynamo makes the folder when it is imported
    from l2c_compile.api import l2c_compile
    from l2c_compile.samplers.compiled_sampler import CompiledSampler
from l2c_compile.checking.reference import run_reference
from l2c_compile.samplers.loaded_sampler import LoadedSampler, load
from l2c_compile.schedules.importers import load_schedule_file
from l2c_compile.schedules.router import Router
from l2c_compile.schedules.rules import HOLD, Hold, Rule
from l2c_compile.schedules.schedule import CacheSchedule, Reuse
from l2c_compile.schedules.sites import Site

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
