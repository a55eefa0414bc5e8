"""Find what Python code reads besides its arguments: attributes, closures, globals, and all that these hold.

The walk begins at some roots (a denoiser, a loop, the objects among its conditions) and goes through modules,
containers, objects of the user's classes, functions with their closures and the globals that they name, and classes. It
does not enter what belongs to torch, numpy, the standard library, this package, or an installed library that defines
none of the roots and none of their modules: there, which object it is counts, and not what is in it. Objects of
installed libraries that a denoiser or a condition holds, such as configurations, are looked into as well.
"""

from __future__ import annotations

import collections
import contextvars
import functools
import itertools
import random
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

Container = dict[Any, Any] | list[Any] | deque[Any] | set[Any] | MappingProxyType[str, Any]
"""What has a content that can change: a dict, a list, a set, or the attributes of a class."""

_OURS = "l2c_compile"
# Parts of this package that hold what a user chose: their objects are looked into like the user's own.
_OURS_TO_ENTER = ("l2c_compile.loops", "l2c_compile.models", "l2c_compile.schedules")
_LIBRARIES = {"torch", "torchgen", "torchvision", "numpy", "scipy", "triton", "networkx", "sympy", "tqdm", "rich"}
_NOT_ENTERED = frozenset({*_LIBRARIES, _OURS, *sys.stdlib_module_names})
_PLAIN_OBJECTS = (
    *(types.SimpleNamespace, threading.local, collections.UserDict, collections.UserList),
    *(weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet),
)
_MOVING = (
    *(itertools.count, types.GeneratorType, random.Random, np.random.Generator, np.random.RandomState, torch.Generator),
    *map(type, (iter([]), iter(()), iter(range(0)), iter(""), iter({}), iter(set()), reversed([]))),
    contextvars.ContextVar,
)

TORCHS_OWN = frozenset(vars(nn.Module()))
"""The attributes that every module has."""
_HOOKS = tuple(f"_forward{when}_hooks{kind}" for when in ("", "_pre") for kind in ("", "_with_kwargs"))
_TORCHS_DICTS = frozenset({"_parameters", "_buffers", "_modules", *_HOOKS})
_TORCHS_THAT_COUNT = _TORCHS_DICTS | {"training"}


@dataclass(frozen=True)
class Held:
    """A container, and where it was found."""

    path: str
    container: Container
    kind: str
    """What its keys are: "attributes", "items", "hooks", "class", or "weights", of which only the forms count."""
    is_users: bool = True
    """Whether it belongs to the user, not to a module that torch itself defines."""
    owner: type | None = None
    """The class, if these are the attributes of one: they are set through it."""


@dataclass
class Reached:
    """All that a walk found."""

    containers: list[Held] = field(default_factory=list)
    objects: list[tuple[str, object]] = field(default_factory=list)
    """The modules and the objects of the user's classes, whose class may be changed."""
    functions: list[tuple[str, FunctionType]] = field(default_factory=list)
    cells: list[tuple[str, CellType]] = field(default_factory=list)
    slots: list[tuple[str, object, str]] = field(default_factory=list)
    """Objects with ``__slots__``, each with the name of a slot that has a value."""
    globals: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)
    """The names that functions read from their modules, each with the dict of that module."""
    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    """Tensors that a graph would hold as constants: all but the denoiser's own weights."""
    arrays: list[tuple[str, np.ndarray[Any, Any]]] = field(default_factory=list)
    moving: list[tuple[str, object]] = field(default_factory=list)
    """Iterators, generators and sources of random numbers, which move on when they are used."""


def reach(roots: Mapping[str, object]) -> Reached:
    """Return all that can be reached from some named objects; the weights of ``roots["denoiser"]`` are the graph's."""
    denoiser = roots.get("denoiser")
    live = set(map(id, (*denoiser.parameters(), *denoiser.buffers()))) if isinstance(denoiser, nn.Module) else set()
    walk = _Walk(live, _libraries_of(roots.values()))
    for name, root in roots.items():
        walk.add(name, root)
    hooks = torch.nn.modules.module
    walk.add("torch's global forward hooks", hooks._global_forward_hooks)
    walk.add("torch's global forward pre-hooks", hooks._global_forward_pre_hooks)
    return walk.finish()


class _Walk:
    """Visits each object once; what is to be visited waits in a list, because nesting may be deep."""

    def __init__(self, live_weights: set[int], libraries: frozenset[str]) -> None:
        self.libraries = libraries
        self.reached = Reached()
        self.live_weights = live_weights
        self.seen: dict[int, object] = {}
        self.classes: set[type] = set()
        self.waiting: list[tuple[str, object]] = []
        self.names: dict[CodeType, tuple[str, ...]] = {}

    def add(self, path: str, value: object) -> None:
        self.waiting.append((path, value))

    def finish(self) -> Reached:
        while self.waiting:
            path, value = self.waiting.pop()
            if value is None or type(value) in (str, int, bool, float, bytes, complex) or id(value) in self.seen:
                continue
            # It is kept, so that its identity is not used again.
            self.seen[id(value)] = value
            self._visit(path, value)
        return self.reached

    def _visit(self, path: str, value: object) -> None:
        if isinstance(value, Tensor):
            if id(value) not in self.live_weights:
                self.reached.tensors.append((path, value))
        elif isinstance(value, nn.Module):
            self._module(path, value)
        elif isinstance(value, (dict, list, deque, set)):
            self._container(path, value, "items")
            self._attributes(path, value)
        elif isinstance(value, (tuple, frozenset)):
            for index, item in enumerate(value):
                self.add(f"{path}[{index}]", item)
        elif isinstance(value, np.ndarray):
            self.reached.arrays.append((path, value))
        elif isinstance(value, FunctionType):
            self._function(path, value)
        elif isinstance(value, MethodType):
            self.add(path, value.__func__)
            self.add(f"{path}.__self__", value.__self__)
        elif isinstance(value, functools.partial):
            self.add(path, value.func)
            self.add(f"{path}.args", value.args)
            self.add(f"{path}.keywords", value.keywords)
        elif isinstance(value, (staticmethod, classmethod, functools._lru_cache_wrapper)):
            self.add(path, value.__wrapped__)
        elif isinstance(value, property):
            self.add(path, value.fget)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, _MOVING):
            self.reached.moving.append((path, value))
        elif isinstance(value, threading.Thread):
            # It goes on by itself.
            return
        elif self._holds_state(path, value):
            self.reached.objects.append((path, value))
            self._attributes(path, value)
            self._class(type(value))

    def _holds_state(self, path: str, value: object) -> bool:
        """Return whether an object is looked into: the user's own, and any that a denoiser or a condition holds."""
        if self._is_entered(type(value)) or isinstance(value, _PLAIN_OBJECTS):
            return True
        is_attribute = path.startswith(("denoiser", "conditions")) and "'s " not in path
        return is_attribute and _module_of(type(value)).partition(".")[0] not in _NOT_ENTERED

    def _is_entered(self, thing: object) -> bool:
        return self._enters(_module_of(thing))

    def _enters(self, module: str) -> bool:
        package = module.partition(".")[0]
        if not package or package in _NOT_ENTERED:
            return module.startswith(_OURS_TO_ENTER)
        return package in self.libraries or not _is_installed(package)

    def _container(self, path: str, container: Container, kind: str, owner: type | None = None) -> None:
        self.reached.containers.append(Held(path, container, kind, owner=owner))
        pairs = container.items() if isinstance(container, (dict, MappingProxyType)) else enumerate(container)
        for key, item in list(pairs):
            self.add(child_path(path, key, kind), item)

    def _attributes(self, path: str, value: object) -> None:
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict) and self._holds_state(path, value):
            self._container(path, own, "attributes")
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ()) if self._is_entered(kind) else ()
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name) and name not in ("__dict__", "__weakref__"):
                    self.reached.slots.append((f"{path}.{name}", value, name))
                    self.add(f"{path}.{name}", getattr(value, name))

    def _module(self, path: str, module: nn.Module) -> None:
        if not self._is_entered(type(module)) and type(module).__module__.startswith(_OURS):
            return
        if isinstance(module, ScriptModule):
            # What torch.jit made keeps its state out of Python.
            return
        own = vars(module)
        self.reached.objects.append((path, module))
        self.reached.containers.append(Held(path, own, "attributes", self._is_entered(type(module))))
        for name, value in list(own.items()):
            if name in _TORCHS_DICTS and not isinstance(value, dict):
                # A module of torch.jit keeps its parts elsewhere.
                continue
            if name in _HOOKS:
                self._container(f"{path}.{name}", value, "hooks")
            elif name in ("_parameters", "_buffers"):
                self.reached.containers.append(Held(path, value, "weights"))
                self.waiting.extend((f"{path}.{key}", weight) for key, weight in value.items())
            elif name == "_modules":
                self._container(path, value, "attributes")
            elif name not in TORCHS_OWN:
                self.add(f"{path}.{name}", value)
        self._class(type(module))

    def _class(self, kind: type) -> None:
        for each in kind.__mro__:
            if each is object or each in self.classes:
                continue
            self.classes.add(each)
            if issubclass(each, nn.Module) or self._is_entered(each):
                path = f"class {each.__qualname__}"
                if self._is_entered(each):
                    self._container(path, vars(each), "class", each)
                else:
                    self.reached.containers.append(Held(path, vars(each), "class", is_users=False, owner=each))

    def _function(self, path: str, function: FunctionType) -> None:
        if not self._is_entered(function):
            return
        self.reached.functions.append((path, function))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.reached.cells.append((f"{path}'s {name}", cell))
            if cell != CellType():
                self.add(f"{path}'s {name}", cell.cell_contents)
        for default in (function.__defaults__, function.__kwdefaults__):
            self.add(f"{path}'s defaults", default)
        self._container(path, vars(function), "attributes")
        own = function.__globals__
        names = self._names_of(function.__code__)
        for name in names:
            if name in own:
                self._global(f"global {name}", own, name)
        # The function may read such a name of a module, too.
        for module in [own[name] for name in names if isinstance(own.get(name), ModuleType)]:
            if self._enters(module.__name__):
                for name in names:
                    if name in vars(module):
                        self._global(f"{module.__name__}.{name}", vars(module), name)

    def _global(self, path: str, own: dict[str, Any], name: str) -> None:
        self.reached.globals.append((path, own, name))
        self.add(path, own[name])

    def _names_of(self, code: CodeType) -> tuple[str, ...]:
        """Return the names of globals and attributes in a function's code, nested functions included."""
        if code not in self.names:
            nested = (self._names_of(each) for each in code.co_consts if isinstance(each, CodeType))
            # globals()["NAME"] has the name among the constants.
            texts = (each for each in code.co_consts if isinstance(each, str) and each.isidentifier())
            names = (*code.co_names, *texts, *(name for inner in nested for name in inner))
            self.names[code] = tuple(dict.fromkeys(names))
        return self.names[code]


def child_path(path: str, key: object, kind: str) -> str:
    """Return the path of what a container holds under a key."""
    return f"{path}[{key!r:.60}]" if kind in ("items", "hooks") else f"{path}.{key}"


def counts(held: Held, key: object) -> bool:
    """Return whether what a container holds under a key can change what code computes."""
    if held.kind == "class":
        # Python itself adds such names to classes.
        return not str(key).startswith("__") or key in ("__call__", "__getattr__", "__getattribute__", "__len__")
    return held.kind != "attributes" or key not in TORCHS_OWN or key in _TORCHS_THAT_COUNT


def _libraries_of(roots: Iterable[object]) -> frozenset[str]:
    """Return the top packages that define the roots, their modules, and the objects that loops are methods of."""
    definers: set[object] = set()
    for root in roots:
        for each in (root, getattr(root, "__self__", None), getattr(root, "func", None)):
            modules = each.modules() if isinstance(each, nn.Module) else ()
            definers.update((each,) if isinstance(each, FunctionType) else type(each).__mro__)
            definers.update(kind for module in modules for kind in type(module).__mro__)
    return frozenset(_module_of(definer).partition(".")[0] for definer in definers)


def _module_of(thing: Any) -> str:  # noqa: ANN401 - a class or a function
    return str(getattr(thing, "__module__", "") or "")


@functools.cache
def _is_installed(package: str) -> bool:
    """Return whether a top package is an installed library, not the user's own code."""
    file = str(getattr(sys.modules.get(package), "__file__", "") or "")
    return "site-packages" in file or "dist-packages" in file


def iterate(container: Container) -> Iterator[tuple[object, object]]:
    """Yield the keys and values of a container, those of a list by position, those of a set in no order."""
    if isinstance(container, (dict, MappingProxyType)):
        yield from container.items()
    else:
        yield from enumerate(container)
