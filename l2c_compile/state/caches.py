"""Find the ``lru_cache``s that a capture left fake tensors in, and empty them: later eager runs would return these."""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from types import FunctionType, ModuleType
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


def clear_caches_of_fakes(denoiser: nn.Module) -> None:
    """Empty every cache of the process that holds a fake tensor; those of torch itself are left."""
    for cache in _caches(denoiser):
        of_torch = str(cache.__wrapped__.__module__).startswith("torch.")
        if cache.cache_info().currsize and not of_torch and _holds_fakes(cache):
            cache.cache_clear()


_Cache = functools._lru_cache_wrapper

# The caches of all modules that are imported, and how many modules those were: a search takes a tenth of a second.
_found: list[weakref.ref[_Cache[Any]]] = []
_num_modules = 0


def _caches(denoiser: nn.Module) -> set[_Cache[Any]]:
    """Return the caches of functions in this process, those that the denoiser made itself included."""
    global _found, _num_modules
    if _num_modules != len(sys.modules):
        # By type: isinstance asks some objects for their class, which then warn or import.
        _found = [weakref.ref(each) for each in gc.get_objects() if type(each) is _Cache]
        _num_modules = len(sys.modules)
    kinds = {kind for module in denoiser.modules() for kind in type(module).__mro__}
    homes = (sys.modules.get(kind.__module__) for kind in kinds)
    holders = [*denoiser.modules(), *kinds, *(home for home in homes if home is not None)]
    near = (each for holder in holders for each in list(vars(holder).values()))
    found = (reference() for reference in _found)
    return {each for each in (*found, *near) if type(each) is _Cache}


def _holds_fakes(cache: object) -> bool:
    # The wrapper refers to a dict of keys and results, or to links with a key and a result each.
    around: list[object] = [cache]
    for _ in range(4):
        around = [each for each in gc.get_referents(*around) if type(each) not in (type, ModuleType, FunctionType)]
        if any(type(each) is FakeTensor for each in around):
            return True
    return False
