"""Give a denoiser back as it was: ``torch.export`` runs its Python on fake tensors, and what that stores would stay.

A table that is made in the first call and kept in an attribute, in a list or in an ``lru_cache`` would be fake in every
later eager run.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.jit import ScriptModule

from l2c_compile.errors import CaptureError


@contextmanager
def left_as_it_was(denoiser: nn.Module) -> Iterator[None]:
    """Restore every attribute of every module, and what its lists, dicts and sets hold, wherever the capture ends.

    Caches of functions that hold fake tensors afterwards are cleared.

    Raises:
        CaptureError: if the denoiser made a submodule, a weight or a buffer, which its graph would refer to.
    """
    # What torch.jit made keeps nothing in attributes of Python.
    named = [(path, module) for path, module in denoiser.named_modules() if not isinstance(module, ScriptModule)]
    saved = [_Saved(path, module) for path, module in named]
    try:
        yield
        for each in saved:
            each.check_nothing_was_added(type(denoiser).__name__)
    finally:
        for each in saved:
            each.restore()
        _clear_caches_of_fakes(denoiser)


class _Saved:
    """The attributes of a module, and what the containers among them hold, nested ones included."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path = path
        self.module = module
        self.attributes = dict(vars(module))
        self.contents = [(held, _content(held)) for held in _containers(self.attributes)]

    def check_nothing_was_added(self, denoiser: str) -> None:
        for name, kind in (("_modules", "submodule"), ("_parameters", "weight"), ("_buffers", "buffer")):
            before = next(content for held, content in self.contents if held is self.attributes[name])
            added = vars(self.module)[name].keys() - before.keys()
            if added:
                made = f"{self.path}.{min(added)}".removeprefix(".")
                raise CaptureError(
                    f"{denoiser} makes its {kind} '{made}' in a call; call it once, eagerly, before it is compiled"
                )

    def restore(self) -> None:
        own = vars(self.module)
        for name in own.keys() - self.attributes.keys():
            del own[name]
        for name, value in self.attributes.items():
            if own.get(name, self) is not value:
                own[name] = value
        for held, content in self.contents:
            if not _holds(held, content):
                held.clear()
                (held.extend if isinstance(held, list) else held.update)(content)


def _containers(values: dict[str, Any]) -> list[Any]:
    """Return the dicts, lists and sets among the values, and those in them; one may contain itself."""
    found: dict[int, Any] = {}
    waiting: list[Any] = list(values.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list, set)) and id(value) not in found:
            found[id(value)] = value
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return list(found.values())


def _content(held: Any) -> Any:  # noqa: ANN401 - a dict, a list or a set
    # A plain one, because the copy of a subclass may want more than its items.
    return next(plain(held) for plain in (dict, list, set) if isinstance(held, plain))


def _holds(held: Any, content: Any) -> bool:  # noqa: ANN401 - a dict, a list or a set
    if len(held) != len(content):
        return False
    if isinstance(held, dict):
        return held.keys() == content.keys() and all(held[key] is content[key] for key in content)
    return all(one is other for one, other in zip(held, content, strict=True))


def _clear_caches_of_fakes(denoiser: nn.Module) -> None:
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
