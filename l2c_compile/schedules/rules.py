"""Rules, which say how a reused value is made from earlier ones.

A rule is a frozen dataclass whose ``combine`` is written with ``torch.ops.aten`` overloads only. The reference calls it
with tensors, the compiler with fx proxies: since there is one body, the two cannot differ. Another rule is another
subclass (here or anywhere) and nothing else: its ``name`` enters the registry when the class is made.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

from l2c_compile.errors import FileFormatError, nearest

T = TypeVar("T")

_RULES: dict[str, type[Rule]] = {}


@dataclass(frozen=True)
class Reading(Generic[T]):
    """The values that a rule may read when one site is reused in one evaluation. ``T`` is a tensor or an fx proxy."""

    history: tuple[T, ...]
    """The values of the site at the sources of the entry, newest first."""
    inputs: tuple[T, ...] = ()
    """The inputs of the site at the same sources; empty unless the rule ``needs_input``."""
    current_input: T | None = None
    """The input of the site in the evaluation that reads; None unless the rule ``needs_input``."""


class Rule(ABC):
    """A way to make a reused value. Subclasses are frozen dataclasses; their fields are the constants of the rule."""

    name: ClassVar[str]
    """The word for the rule in files, which no other rule has."""
    history: ClassVar[Literal["computed", "held"]] = "computed"
    """The values that a source may have: ``computed`` if it must have computed the site, ``held`` if the value there
    may itself be a reused one."""
    needs_input: ClassVar[bool] = False
    """Whether the rule also reads the input of the site, at the sources and in the evaluation that reads."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("name")
        if name is None:
            return
        known = _RULES.get(name)
        # dataclass(slots=True) makes the class a second time, under the same name.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"rule name {name!r} of {cls.__qualname__} is already taken by {known.__qualname__}")
        _RULES[name] = cls

    @property
    @abstractmethod
    def num_sources(self) -> int:
        """The number of source evaluations that an entry with this rule names."""

    @abstractmethod
    def combine(self, reading: Reading[T]) -> T:
        """Return the value. Use ``torch.ops.aten.<op>.<overload>`` only, and never write to an operand."""

    def to_dict(self) -> dict[str, object]:
        """Return ``name`` and the fields in JSON types. A rule with tensors overrides this and ``from_fields``."""
        assert dataclasses.is_dataclass(self)
        return {"name": self.name, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}}

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> Rule:
        """Return the rule with these fields of its JSON form, after turning lists into tuples."""
        return cls(**{key: _tuples(value) for key, value in fields.items()})


def rule_from_dict(document: Mapping[str, object]) -> Rule:
    """Return the rule whose ``to_dict`` is ``document``.

    Raises:
        FileFormatError: if no rule has that name, or the rule does not take those fields.
    """
    name = document.get("name")
    if not isinstance(name, str) or name not in _RULES:
        raise FileFormatError(
            f"a rule wants one of the names {sorted(_RULES)}, got {name!r:.80}. {nearest(str(name), _RULES)}"
        )
    try:
        return _RULES[name].from_fields({key: value for key, value in document.items() if key != "name"})
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"rule {name!r} does not take these fields: {error}") from error


@dataclass(frozen=True)
class Hold(Rule):
    """The rule that takes the value at the source unchanged (Learning-to-Cache, arXiv 2406.01733, and most caches)."""

    name: ClassVar[str] = "hold"

    @property
    def num_sources(self) -> int:
        """The number 1: the one source is the evaluation whose value is held."""
        return 1

    def combine(self, reading: Reading[T]) -> T:
        """Return the value at the source."""
        return reading.history[0]


HOLD = Hold()


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
