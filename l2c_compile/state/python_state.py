"""A snapshot of Python state: whether it still holds, what changed, and how it is put back.

``holds`` runs before every call of a sampler, so it compares all containers with their copies in one step in C, which
takes identical values for equal. What == takes for equal though code may not (1, 1.0 and True, 0.0 and -0.0, a tensor)
is compared by identity. Only if anything differs, ``changes`` walks again and compares value by value.
"""

from __future__ import annotations

import itertools
import operator
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Number
from types import CellType, FunctionType, GeneratorType, MappingProxyType, MethodType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from l2c_compile.state.walk import TORCHS_OWN, Container, Held, Reached, child_path, counts, iterate, reach

_EMPTY = CellType()
_MISSING = object()
_STRICT = (Number, Tensor, list, tuple, dict, set, frozenset)
_MAX_ELEMENTS = 4096
"""Arrays are compared whole up to this size; of larger ones so many elements are."""


@dataclass(frozen=True)
class Change:
    """Something that is not as it was when a snapshot was taken."""

    path: str
    """Where it is: "denoiser.blocks.3.scale", "loop's steps", "global SCALE"."""
    before: str
    """A short text for the value in the snapshot; "" if there was none."""
    after: str
    """A short text for the value now; "" if there is none."""
    is_tensor: bool = False
    """Whether a tensor was there, or is now."""

    def __str__(self) -> str:
        if self.before == self.after:
            return f"'{self.path}' was written to"
        if not self.before:
            return f"'{self.path}' is new ({self.after})"
        return f"'{self.path}' was {self.before} and is {self.after or 'gone'}"


class PythonState:
    """What can be reached from some objects, as it is now.

    Args:
        roots: the objects by the names that paths begin with. The weights of "denoiser" count by their form only,
            because a graph reads them where they are.
    """

    def __init__(self, roots: Mapping[str, object]) -> None:
        self.roots = dict(roots)
        self._reached: Reached = reach(self.roots)
        containers = self._reached.containers
        self._live = [held.container for held in containers]
        self._copies = [_content(held.container) for held in containers]
        self._empty = [held for held, copy in zip(self._live, self._copies, strict=True) if not copy]
        filled = [(held, copy) for held, copy in zip(containers, self._copies, strict=True) if copy]
        self._filled = [held.container for held, _ in filled]
        self._filled_copies = [copy for _, copy in filled]
        strict = list(_strict_entries(filled))
        self._strict_owners = [owner for owner, _, _ in strict]
        self._strict_keys = [key for _, key, _ in strict]
        self._strict_values = [value for _, _, value in strict]
        self._objects = [each for _, each in self._reached.objects]
        self._classes = list(map(type, self._objects))
        self._functions = [function for _, function in self._reached.functions]
        self._code = list(map(_code_of, self._functions))
        self._cells = [_content_of(cell) for _, cell in self._reached.cells]
        self._slots = [getattr(owner, name, _MISSING) for _, owner, name in self._reached.slots]
        self._global_dicts = [own for _, own, _ in self._reached.globals]
        self._global_names = [name for _, _, name in self._reached.globals]
        self._globals = list(map(dict.get, self._global_dicts, self._global_names))
        # Tensors are asked below every __torch_function__, which may refuse or record, and takes time.
        with torch._C.DisableTorchFunction():
            self._counted = [tensor for _, tensor in self._reached.tensors if not tensor.is_inference()]
        self._versions = self._versions_now()
        self._arrays = [_elements(array).copy() for _, array in self._reached.arrays]
        self._positions = [_position(moving) for _, moving in self._reached.moving]

    def holds(self) -> bool:
        """Return whether all is as it was; False may also mean that equal values are other objects now."""
        try:
            return (
                not any(self._empty)
                and self._filled == self._filled_copies
                and _are(map(operator.getitem, self._strict_owners, self._strict_keys), self._strict_values)
                and list(map(_code_of, self._functions)) == self._code
                and self._all_but_containers_hold()
            )
        # Whatever an object of the user's does when it is compared: a value by value comparison follows.
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError):
            return False

    def is_untouched(self) -> bool:
        """Return whether every value is the same object as before; slower than ``holds``, but compares nothing else."""
        return all(map(_holds_these, self._live, self._copies)) and self._all_but_containers_hold()

    def _all_but_containers_hold(self) -> bool:
        return (
            list(map(type, self._objects)) == self._classes
            and _are(map(dict.get, self._global_dicts, self._global_names), self._globals)
            and _are((_content_of(cell) for _, cell in self._reached.cells), self._cells)
            and _are((getattr(owner, name, _MISSING) for _, owner, name in self._reached.slots), self._slots)
            and self._versions_now() == self._versions
            and all(map(_same_elements, self._reached.arrays, self._arrays))
            and [_position(moving) for _, moving in self._reached.moving] == self._positions
        )

    def _versions_now(self) -> list[int]:
        with torch._C.DisableTorchFunction():
            return list(map(_version, self._counted))

    def changes(self) -> list[Change]:
        """Return what can change what code computes and is not as it was, in no particular order."""
        return self.changes_to(PythonState(self.roots))

    def changes_to(self, later: PythonState, *, by_form: bool = False) -> list[Change]:
        """Return what differs between this snapshot and a later one of the same roots.

        Args:
            later: the later snapshot.
            by_form: whether of tensors and objects only the form and the class count, not which ones they are.
        """
        before, after = self._described(by_form), later._described(by_form)
        paths = [*before, *(path for path in after if path not in before)]
        changed = dict.fromkeys(p for p in paths if before.get(p, _GONE).key != after.get(p, _GONE).key)
        # Whatever a new object holds is new as well, so the outermost change says it all.
        inner = {path for path in changed if any(outer in changed for outer in _outer_paths(path))}
        return [
            Change(
                path,
                before.get(path, _GONE).text,
                after.get(path, _GONE).text,
                before.get(path, _GONE).is_tensor or after.get(path, _GONE).is_tensor,
            )
            for path in changed
            if path not in inner
        ]

    def restore(self) -> None:
        """Put back what every container, closure and global held; tensors keep what was written into them."""
        for held, content in zip(self._reached.containers, self._copies, strict=True):
            _restore(held, content)
        for (_, cell), value in zip(self._reached.cells, self._cells, strict=True):
            if _content_of(cell) is not value:
                cell.cell_contents = value
        for (_, owner, name), value in zip(self._reached.slots, self._slots, strict=True):
            if getattr(owner, name, _MISSING) is not value:
                object.__setattr__(owner, name, value)
        for own, name, value in zip(self._global_dicts, self._global_names, self._globals, strict=True):
            if own.get(name) is not value:
                own[name] = value

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that a graph would hold as constants."""
        return [tensor for _, tensor in self._reached.tensors]

    def tensors_not_in(self, earlier: PythonState) -> dict[str, Tensor]:
        """Return the tensors, by path, that an earlier snapshot did not hold; weights of the denoiser do not count."""
        old = {id(tensor) for _, tensor in earlier._reached.tensors}
        return {path: tensor for path, tensor in self._reached.tensors if id(tensor) not in old}

    def numbers(self) -> dict[str, int | float]:
        """Return the whole and floating numbers that containers hold, by path."""
        return {
            child_path(held.path, key, held.kind): cast(Any, value)
            for held, content in zip(self._reached.containers, self._copies, strict=True)
            for key, value in iterate(content)
            if type(value) in (int, float) and counts(held, key)
        }

    def install(self, substitutes: Mapping[int, object], numbers: Mapping[str, object]) -> None:
        """Put back all but weights and hooks, with other values in place of some.

        Args:
            substitutes: objects to put in place of others, by the identities of those.
            numbers: values to put in place of numbers, by their paths.
        """
        for held, content in zip(self._reached.containers, self._copies, strict=True):
            if held.kind not in ("weights", "hooks"):
                _restore(held, _substituted(held, content, substitutes, numbers))
        for (_, cell), value in zip(self._reached.cells, self._cells, strict=True):
            if _content_of(cell) is not value:
                cell.cell_contents = substitutes.get(id(value), value)
        for own, name, value in zip(self._global_dicts, self._global_names, self._globals, strict=True):
            if own.get(name) is not value:
                own[name] = substitutes.get(id(value), value)

    def _described(self, by_form: bool) -> dict[str, _Description]:
        """Return a description of every value by its path."""
        found: dict[str, _Description] = {}
        versions = dict(zip(map(id, self._counted), self._versions, strict=True))
        for held, content in zip(self._reached.containers, self._copies, strict=True):
            for key, value in iterate(content):
                if counts(held, key) and not _is_our_hook(value):
                    path = child_path(held.path, key, held.kind)
                    found[path] = _describe(value, versions, by_form or held.kind == "weights")
            if held.kind == "items":
                found[f"{held.path}.length"] = _Description(len(content), str(len(content)))
        for (path, _), kind in zip(self._reached.objects, self._classes, strict=True):
            found[f"{path}.__class__"] = _Description(kind, kind.__qualname__)
        for (path, _), code in zip(self._reached.functions, self._code, strict=True):
            defaults = _describe((code[1], tuple((code[2] or {}).items())), versions, by_form)
            found[f"{path}.__code__"] = _Description((id(code[0]), defaults.key), "another code or defaults")
        named = [
            *((path, value) for (path, _), value in zip(self._reached.cells, self._cells, strict=True)),
            *((path, value) for (path, _, _), value in zip(self._reached.slots, self._slots, strict=True)),
            *((path, value) for (path, _, _), value in zip(self._reached.globals, self._globals, strict=True)),
            *self._reached.tensors,
            *self.roots.items(),
        ]
        for path, value in named:
            found[path] = _describe(value, versions, by_form)
        for (path, _), elements in zip(self._reached.arrays, self._arrays, strict=True):
            found[f"{path}.elements"] = _Description(elements.tobytes(), "an array")
        for (path, _), position in zip(self._reached.moving, self._positions, strict=True):
            found[f"{path}.position"] = _Description(position, "used")
        return found


@dataclass(frozen=True)
class _Description:
    """What counts of a value, and a short text of it."""

    key: object
    text: str
    is_tensor: bool = False


_GONE = _Description(_MISSING, "")


def _describe(value: object, versions: Mapping[int, int], by_form: bool) -> _Description:
    kind = type(value)
    if isinstance(value, Tensor):
        with torch._C.DisableTorchFunction():
            text = f"a tensor {list(value.shape)}"
            form = (value.shape, value.dtype, value.device)
        return _Description(form if by_form else (id(value), versions.get(id(value))), text, is_tensor=True)
    if kind is MethodType:
        method = cast(MethodType, value)
        return _Description((id(method.__func__), id(method.__self__)), f"{value!r:.60}")
    if value is None or isinstance(value, (str, bytes, Number)):
        # Of numbers, 1, 1.0 and True are three values, and 0.0 and -0.0 are two.
        return _Description((kind, repr(value)), f"{value!r:.60}")
    if isinstance(value, (tuple, frozenset)):
        keys = [_describe(item, versions, by_form).key for item in value]
        return _Description((kind, frozenset(keys) if isinstance(value, frozenset) else tuple(keys)), f"{value!r:.60}")
    if kind in (dict, list, set, deque):
        # What they hold is described by itself.
        return _Description(kind, f"a {kind.__name__}")
    if isinstance(value, (torch.dtype, torch.device)):
        return _Description(value, str(value))
    identity: object = kind if by_form else id(value)
    if isinstance(value, nn.Module):
        return _Description(identity, f"a {kind.__name__}")
    if isinstance(value, (type, FunctionType)):
        return _Description(identity, value.__qualname__)
    return _Description(identity, f"a {kind.__qualname__}")


def _is_our_hook(value: object) -> bool:
    return isinstance(value, FunctionType) and value.__module__.startswith(
        ("l2c_compile.frontend.", "l2c_compile.checking.")
    )


def _outer_paths(path: str) -> Iterator[str]:
    """Yield the paths of what a path lies in."""
    for index, character in enumerate(path):
        if index and character in ".[":
            yield path[:index]


def _strict_entries(filled: Sequence[tuple[Held, Any]]) -> Iterator[tuple[Any, Any, object]]:
    for held, content in filled:
        if isinstance(held.container, set) or held.kind == "weights" or not held.is_users:
            continue
        for key, value in iterate(content):
            if isinstance(value, _STRICT) and key not in TORCHS_OWN:
                yield held.container, key, value


def _are(values: Iterator[object] | map[Any], expected: Sequence[object]) -> bool:
    return all(map(operator.is_, values, expected))


_code_of: Callable[[object], tuple[Any, ...]] = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_version: Callable[[Tensor], int] = operator.attrgetter("_version")


def _content_of(cell: CellType) -> object:
    return _MISSING if cell == _EMPTY else cell.cell_contents


def _position(moving: Any) -> object:  # noqa: ANN401 - one of those that a walk takes for moving
    """Return how far an iterator or a source of random numbers has come."""
    if isinstance(moving, GeneratorType):
        frame = moving.gi_frame
        return None if frame is None else (frame.f_lasti, repr(frame.f_locals))
    if isinstance(moving, ContextVar):
        return id(moving.get(None))
    if isinstance(moving, random.Random):
        return hash(moving.getstate())
    if isinstance(moving, (np.random.Generator, np.random.RandomState)):
        return repr(moving.bit_generator.state if isinstance(moving, np.random.Generator) else moving.get_state())
    if isinstance(moving, torch.Generator):
        return moving.get_state().numpy().tobytes()
    return repr(moving) if isinstance(moving, itertools.count) else operator.length_hint(moving)


def _content(container: Container) -> Any:  # noqa: ANN401 - a dict, a list or a set
    # A plain one, because the copy of a subclass may want more than its items.
    if isinstance(container, (dict, MappingProxyType)):
        return dict(container)
    return (
        set(container)
        if isinstance(container, set)
        else deque(container)
        if isinstance(container, deque)
        else list(container)
    )


def _restore(held: Held, content: Any) -> None:  # noqa: ANN401 - as _content returns it
    container = held.container
    if _holds_these(container, content):
        return
    if isinstance(container, MappingProxyType):
        assert held.owner is not None
        for name in [name for name in container if name not in content and counts(held, name)]:
            delattr(held.owner, name)
        for name, value in content.items():
            if container.get(name, _MISSING) is not value and counts(held, name):
                setattr(held.owner, name, value)
        return
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(content)
    else:
        container.update(content)


def _substituted(held: Held, content: Any, substitutes: Mapping[int, object], numbers: Mapping[str, object]) -> Any:  # noqa: ANN401 - as _content returns it
    pairs = [
        (key, numbers.get(child_path(held.path, key, held.kind), substitutes.get(id(value), value)))
        for key, value in iterate(content)
    ]
    return dict(pairs) if isinstance(content, dict) else type(content)(value for _, value in pairs)


def _holds_these(container: Container, content: Any) -> bool:  # noqa: ANN401 - as _content returns it
    if len(container) != len(content):
        return False
    if isinstance(container, (dict, MappingProxyType)):
        return all(content.get(key, _MISSING) is value for key, value in container.items())
    if isinstance(container, set):
        return bool(container == content)
    return all(one is other for one, other in zip(container, content, strict=True))


def _elements(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    flat = array.reshape(-1)
    return flat[:: max(1, flat.size // _MAX_ELEMENTS)]


def _same_elements(found: tuple[str, np.ndarray[Any, Any]], elements: np.ndarray[Any, Any]) -> bool:
    return _elements(found[1]).tobytes() == elements.tobytes()
