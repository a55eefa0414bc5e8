"""Compare the rows of a run with the targets in ``targets.toml``."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import Condition, Record
from l2c_compile.errors import FileFormatError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TARGETS_FILE = Path(__file__).with_name("targets.toml")

_HOLDS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}
_REQUIRED = {"bench", "metric", "comparison", "value", "reason"}
_OPTIONAL = {"conditions", "decimals"}


@dataclass(frozen=True)
class Target:
    """A number that a bench must reach."""

    bench: str
    metric: str
    comparison: str
    """The comparison ``<=``, ``>=`` or ``==``, with the measured value on the left."""
    value: float
    reason: str
    """The reason for this number."""
    conditions: Mapping[str, Condition]
    """The conditions that a row must have; it may have others beside them."""
    decimals: int | None
    """The number of decimals that the measured value is rounded to first; None does not round."""

    def __str__(self) -> str:
        conditions = ", ".join(f"{name}={value}" for name, value in self.conditions.items())
        where = f" ({conditions})" if conditions else ""
        return f"{self.bench} {self.metric}{where} {self.comparison} {self.value:.10g}"

    def is_about(self, record: Record) -> bool:
        """Return whether the record measures what the target asks for."""
        same = (record.bench, record.metric) == (self.bench, self.metric)
        return same and self.conditions.items() <= record.conditions.items()

    def holds_for(self, record: Record) -> bool:
        """Return whether the measured value is good enough; NaN never is."""
        value = record.value if self.decimals is None else round(record.value, self.decimals)
        return _HOLDS[self.comparison](value, self.value)


@dataclass(frozen=True)
class Verdict:
    """What a run says of a target: whether it is met, and by which records it is not."""

    target: Target
    short: tuple[Record, ...]
    """The records that fall short."""
    num_measured: int
    """The number of records that the target is about."""

    @property
    def met(self) -> bool:
        """Whether the target was measured, and met by every record that it is about."""
        return self.num_measured > 0 and not self.short

    def __str__(self) -> str:
        if self.met:
            return f"met: {self.target}"
        if not self.num_measured:
            return f"not measured: {self.target}"
        got = ", ".join(f"{record.value:.10g}" for record in self.short)
        return f"falls short: {self.target}, got {got} ({self.target.reason})"


def check(bench: str, targets: Iterable[Target], rows: Sequence[Record]) -> list[Verdict]:
    """Return a verdict for each target of the bench; a target needs a row, and must hold for every row it is about."""
    verdicts = []
    for target in targets:
        if target.bench != bench:
            continue
        meant = [row for row in rows if target.is_about(row)]
        short = tuple(row for row in meant if not target.holds_for(row))
        verdicts.append(Verdict(target, short, len(meant)))
    return verdicts


def read_targets(path: Path = TARGETS_FILE) -> list[Target]:
    """Read a targets file, which has a ``[[target]]`` table for each number.

    Raises:
        FileFormatError: if the file is no TOML, or a target lacks a key, has an unknown one, or an unknown comparison.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise FileFormatError(f"{path.name} wants TOML, got {error}") from error
    return [_target(path.name, number, table) for number, table in enumerate(content.get("target", []), start=1)]


def _target(file: str, number: int, table: Mapping[str, object]) -> Target:
    keys = set(table)
    if not keys >= _REQUIRED or not keys <= _REQUIRED | _OPTIONAL:
        wanted = f"{', '.join(sorted(_REQUIRED))} and perhaps {', '.join(sorted(_OPTIONAL))}"
        raise FileFormatError(f"target {number} of {file} wants the keys {wanted}, got {', '.join(sorted(keys))}")
    value, conditions, decimals = table["value"], table.get("conditions", {}), table.get("decimals")
    if table["comparison"] not in _HOLDS:
        raise FileFormatError(
            f"target {number} of {file} wants one of {', '.join(_HOLDS)}, got {table['comparison']!r}"
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FileFormatError(f"target {number} of {file} wants a number as value, got {value!r}")
    if not isinstance(conditions, dict) or not isinstance(decimals, int | None):
        raise FileFormatError(f"target {number} of {file} wants a table of conditions and a whole number of decimals")
    return Target(
        bench=str(table["bench"]),
        metric=str(table["metric"]),
        comparison=str(table["comparison"]),
        value=float(value),
        reason=str(table["reason"]),
        conditions=conditions,
        decimals=decimals,
    )
