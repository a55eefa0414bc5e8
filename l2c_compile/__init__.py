"""l2c_compile: compile the sampling loop of a diffusion model, caches included, into one static graph.

A name is imported when it is first used, so that ``l2c --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from l2c_compile.api import l2c_compile
    from l2c_compile.checking.reference import run_reference
    from l2c_compile.errors import L2CError
    from l2c_compile.samplers.compiled_sampler import CompiledSampler
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

_HOMES = {
    "api": ("l2c_compile",),
    "checking.reference": ("run_reference",),
    "errors": ("L2CError",),
    "samplers.compiled_sampler": ("CompiledSampler",),
    "samplers.loaded_sampler": ("LoadedSampler", "load"),
    "schedules.importers": ("load_schedule_file",),
    "schedules.router": ("Router",),
    "schedules.rules": ("HOLD", "Hold", "Rule"),
    "schedules.schedule": ("CacheSchedule", "Reuse"),
    "schedules.sites": ("Site",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
