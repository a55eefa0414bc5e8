"""Rules of one's own, as a user would write them, one for each thing that a rule may read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from l2c_compile.schedules.rules import Reading, Rule, T


@dataclass(frozen=True)
class Combination(Rule):
    """A linear combination of the last values: c0 * newest + c1 * older."""

    name: ClassVar[str] = "test combination"
    coefficients: tuple[float, ...]

    @property
    def num_sources(self) -> int:
        """One source for each coefficient."""
        return len(self.coefficients)

    def combine(self, reading: Reading[T]) -> T:
        """Return the weighted sum."""
        total: Any = None
        for weight, value in zip(self.coefficients, reading.history, strict=True):
            term = torch.ops.aten.mul.Scalar(value, weight)
            total = term if total is None else torch.ops.aten.add.Tensor(total, term)
        return total  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Decay(Rule):
    """Nine tenths of the value that the site held before, which may be a reused one."""

    name: ClassVar[str] = "test decay"
    history: ClassVar[Literal["computed", "held"]] = "held"

    @property
    def num_sources(self) -> int:
        """One source."""
        return 1

    def combine(self, reading: Reading[T]) -> T:
        """Return nine tenths of what was held."""
        return torch.ops.aten.mul.Scalar(reading.history[0], 0.9)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class FollowInput(Rule):
    """The value at the source plus the change of its input since then."""

    name: ClassVar[str] = "test follow input"
    needs_input: ClassVar[bool] = True

    @property
    def num_sources(self) -> int:
        """One source."""
        return 1

    def combine(self, reading: Reading[T]) -> T:
        """Return the value moved along with its input."""
        change = torch.ops.aten.sub.Tensor(reading.current_input, reading.inputs[0])
        return torch.ops.aten.add.Tensor(reading.history[0], change)  # type: ignore[no-any-return]
