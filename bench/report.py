"""The rows of a run: what a case measured and what the harness adds to it, as a table and as a JSON file."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from rich.table import Table

from bench.measure import Ratio, Timing
from l2c_compile.errors import L2CError
from l2c_compile.files.documents import write_atomically

ROOT = Path(__file__).resolve().parent.parent
"""The checkout that this file is in."""
RESULTS = ROOT / "bench" / "results"

Condition: TypeAlias = str | int | float | bool


class ReportError(L2CError, ValueError):
    """A result that cannot be written where it was asked for."""


@dataclass(frozen=True)
class Row:
    """One measured number, as a case returns it."""

    metric: str
    """The name of what was measured; a target finds the row by it and the conditions."""
    value: float
    """The measured number, or the median where there are several measurements."""
    unit: str = ""
    """The unit of value, p20 and p80; empty for a plain number."""
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    """The conditions of the measurement: model, steps, dtype, batch, file."""
    p20: float | None = None
    """The 20th percentile, where there are several measurements."""
    p80: float | None = None
    """The 80th percentile, where there are several measurements."""
    device: str = "cpu"
    """The torch device of the measurement."""

    @classmethod
    def timed(
        cls, metric: str, timing: Timing, conditions: Mapping[str, Condition] | None = None, *, device: str = "cpu"
    ) -> Row:
        """Return the row of a timing, in ms."""
        return cls(metric, timing.median_ms, "ms", conditions or {}, timing.p20_ms, timing.p80_ms, device)

    @classmethod
    def ratio(
        cls, metric: str, ratio: Ratio, conditions: Mapping[str, Condition] | None = None, *, device: str = "cpu"
    ) -> Row:
        """Return the row of a ratio, in x."""
        return cls(metric, ratio.value, "x", conditions or {}, ratio.p20, ratio.p80, device)


@dataclass(frozen=True)
class Surroundings:
    """The versions, commit and date of a run, which hold for all of its rows."""

    torch: str
    triton: str
    python: str
    commit: str
    """The short hash, with ``-dirty`` behind it if the tree had changes."""
    date: str
    """The start of the run in UTC, as ISO 8601."""

    @classmethod
    def here_and_now(cls) -> Surroundings:
        """Return the surroundings of this run: the installed packages, the commit that git names, and the time."""
        return cls(
            torch=_version("torch"),
            triton=_version("triton"),
            python=platform.python_version(),
            commit=_commit(ROOT),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )


@dataclass(frozen=True)
class Record:
    """A row with all that is needed to compare it with a row of another day."""

    bench: str
    metric: str
    value: float
    unit: str
    p20: float | None
    p80: float | None
    conditions: dict[str, Condition]
    device: str
    """The name of the CPU or GPU model."""
    torch: str
    triton: str
    python: str
    commit: str
    date: str


def records(bench: str, rows: Sequence[Row], surroundings: Surroundings) -> list[Record]:
    """Return a record for each row of one bench, with the surroundings in it."""
    return [
        Record(
            bench=bench,
            metric=row.metric,
            value=float(row.value),
            unit=row.unit,
            p20=row.p20,
            p80=row.p80,
            conditions=dict(row.conditions),
            device=_device_name(row.device),
            **dataclasses.asdict(surroundings),
        )
        for row in rows
    ]


def results_table(rows: Sequence[Record]) -> Table:
    """Return the table that is printed at the end of a run; what all rows share stands below it."""
    table = Table(title=rows[0].bench if rows else None, title_justify="left", caption_justify="left")
    table.add_column("metric", overflow="fold")
    table.add_column("conditions", overflow="fold")
    for heading in ("value", "p20", "p80"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for row in rows:
        conditions = ", ".join(f"{name}={value}" for name, value in row.conditions.items())
        table.add_row(row.metric, conditions, *map(_number, (row.value, row.p20, row.p80)), row.unit)
    if rows:
        devices = ", ".join(dict.fromkeys(row.device for row in rows))
        last = rows[-1]
        table.caption = (
            f"{devices}; torch {last.torch}, triton {last.triton}, python {last.python}; {last.commit}, {last.date}"
        )
    return table


def write_json(path: Path, rows: Sequence[Record]) -> None:
    """Write the rows as a JSON list, at once or not at all. A number that is not finite is written as null.

    Raises:
        ReportError: if the file is a kept result, because those are never edited.
    """
    if path.exists() and RESULTS in path.resolve().parents:
        raise ReportError(f"{path.name} in bench/results is kept as it was measured; choose a new dated name")
    text = json.dumps([_finite(dataclasses.asdict(row)) for row in rows], indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _finite(record: dict[str, object]) -> dict[str, object]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit(root: Path) -> str:
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changes = _git(root, "status", "--porcelain")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changes else commit


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
