"""Put back what the trace of a loop changes in objects that outlive it.

A loop that is traced runs once with tensors without values. What it keeps of them (the earlier predictions of a
multistep scheduler, its step counter) belongs to that run: later runs, traced or not, begin where this one began.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from l2c_compile.errors import LoopTraceError
from l2c_compile.frontend.loop_result import consumed
from l2c_compile.frontend.loop_tensor import LoopTensor
from l2c_compile.frontend.stand_in import Loop

_MAX_OBJECTS = 20_000
_MAX_DEPTH = 8


@contextmanager
def left_as_found(loop: object, conditions: Mapping[str, object], denoiser: nn.Module) -> Iterator[None]:
    """Restore what a run of a loop changes in its variables, its own object and its conditions, and all that they hold.

    The denoiser is left to the loop.

    Args:
        loop: the function or callable object that runs while the context is open.
        conditions: what the loop is given besides the noise.
        denoiser: the module that the loop calls.

    Raises:
        LoopTraceError: if a variable that outlives the loop holds tensors without values when it ends.
    """
    finder = _HolderFinder(denoiser)
    finder.visit(loop)
    for name, value in conditions.items():
        finder.add(value, f"condition '{name}'", 0)
    finder.run()
    try:
        yield
        for holder in finder.holders:
            holder.check()
    finally:
        for holder in finder.holders:
            holder.restore()


def restoring(loop: Loop, denoiser: nn.Module) -> Loop:
    """Return a loop that does the same, and leaves what outlives it as it found it; a generator is run to its end."""

    def run(denoiser_given: nn.Module, noise: object, **conditions: object) -> object:
        with left_as_found(loop, conditions, denoiser):
            return consumed(loop(denoiser_given, noise, **conditions))

    return run


class _Holder:
    """Something that holds values: a dict, a list, a set, a deque, or a variable of an enclosing function.

    Args:
        held: the container or the cell.
        name: what the user calls it; None for one inside an object, which is restored whatever it holds.
    """

    def __init__(self, held: Any, name: str | None) -> None:  # noqa: ANN401 - see above
        self.held = held
        self.name = name
        self.before = self._now()

    def _now(self) -> Any:  # noqa: ANN401 - a dict or a list
        if isinstance(self.held, CellType):
            try:
                return [self.held.cell_contents]
            except ValueError:  # the variable has no value yet
                return []
        return dict(self.held) if isinstance(self.held, dict) else list(self.held)

    def values(self) -> list[Any]:
        return list(self.before.values()) if isinstance(self.before, dict) else self.before

    def check(self) -> None:
        if self.name is None or self._is_as_before():
            return
        now = self._now()
        kept = {id(value) for value in self.values()}
        for key, value in now.items() if isinstance(now, dict) else enumerate(now):
            if id(value) not in kept:
                self._check_value(key, value)

    def _check_value(self, key: object, value: object) -> None:
        if any(isinstance(leaf, (LoopTensor, FakeTensor)) for leaf in tree_leaves(value)):
            raise LoopTraceError(
                f"the loop keeps tensors in {self._name_of(key)}, which outlives it and which a sampler would not fill;"
                " return them from the loop, or keep them in something that the loop makes"
            )

    def _name_of(self, key: object) -> str | None:
        return self.name

    def _is_as_before(self) -> bool:
        now = self._now()
        if len(now) != len(self.before):
            return False
        if isinstance(now, dict):
            return all(key in now and now[key] is value for key, value in self.before.items())
        return all(one is other for one, other in zip(now, self.before, strict=True))

    def restore(self) -> None:
        if self._is_as_before():
            return
        if isinstance(self.held, CellType):
            if self.before:
                (self.held.cell_contents,) = self.before
            else:
                del self.held.cell_contents
            return
        if isinstance(self.held, dict) and self.before.keys() <= self.held.keys():
            # Attributes stay there meanwhile, in their order.
            for key in self.held.keys() - self.before.keys():
                del self.held[key]
            self.held.update(self.before)
            return
        self.held.clear()
        (self.held.extend if isinstance(self.held, (list, deque)) else self.held.update)(self.before)


class _Globals(_Holder):
    """The global variables that a function names, by name."""

    def __init__(self, held: dict[str, Any], names: Iterable[str]) -> None:
        self.names = [name for name in names if name in held]
        super().__init__(held, "a global variable")

    def _now(self) -> dict[str, Any]:
        return {name: self.held[name] for name in self.names if name in self.held}

    def _name_of(self, key: object) -> str:
        return f"global variable '{key}'"

    def restore(self) -> None:
        self.held.update(self.before)


class _HolderFinder:
    """Finds what a loop can reach and change."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.holders: list[_Holder] = []
        self._waiting: deque[tuple[Any, str | None, int]] = deque()
        self._seen = set(map(id, denoiser.modules()))

    def add(self, value: object, name: str | None, depth: int) -> None:
        if depth <= _MAX_DEPTH and not isinstance(value, _HOLDS_NOTHING) and id(value) not in self._seen:
            self._seen.add(id(value))
            self._waiting.append((value, name, depth))

    def run(self) -> None:
        while self._waiting and len(self._seen) < _MAX_OBJECTS:
            self.visit(*self._waiting.popleft())

    def visit(self, value: Any, name: str | None = None, depth: int = 0) -> None:  # noqa: ANN401 - any object
        if type(value).__module__.partition(".")[0] in _LIBRARIES and not isinstance(value, nn.Module):
            return
        if isinstance(value, FunctionType):
            self._visit_function(value, depth)
        elif isinstance(value, MethodType):
            self.add(value.__self__, None, depth + 1)
            self.add(value.__func__, None, depth + 1)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.add(part, "an argument of functools.partial", depth + 1)
        elif isinstance(value, (dict, list, set, deque)):
            self._hold(_Holder(value, name), depth)
        elif isinstance(value, (tuple, frozenset)):
            for part in value:
                self.add(part, name, depth + 1)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._hold(_Holder(vars(value), None), depth)

    def _visit_function(self, function: FunctionType, depth: int) -> None:
        if function.__module__ and function.__module__.partition(".")[0] in _LIBRARIES:
            return
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            holder = _Holder(cell, f"variable '{variable}'")
            self.holders.append(holder)
            for value in holder.values():
                self.add(value, f"variable '{variable}'", depth + 1)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.add(default, "the default of an argument", depth + 1)
        variables = _Globals(function.__globals__, _names_in(function.__code__))
        self.holders.append(variables)
        for variable, value in variables.before.items():
            self.add(value, f"global variable '{variable}'", depth + 1)

    def _hold(self, holder: _Holder, depth: int) -> None:
        self.holders.append(holder)
        for value in holder.values():
            self.add(value, holder.name, depth + 1)


_HOLDS_NOTHING = (type, ModuleType, Tensor, str, bytes, int, float, complex, type(None))
_LIBRARIES = frozenset({"torch", "numpy", "l2c_compile", "logging", "threading", "tqdm"})


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
