"""Run the tests against the oldest and the newest supported torch, each in a fresh virtual environment.

Options: ``--torch VERSION...`` (default: the oldest supported, 2.11.0, and the one CI pins), ``--quick`` (a few test
files that need no compiler), ``--index URL`` (for torch alone; CPU builds have an index of their own), ``--keep DIR``
(where the environments stay; by default they are removed). An environment that cannot be made is a row, too: value 0
of ``installed``, with what pip said. A CUDA build of torch fetches gigabytes, so only CPU builds are taken unless
``--any-build`` is given.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from bench.options import Options
from bench.report import ROOT, Condition, Row

OLDEST = "2.11.0"
PINNED = "2.13.0"
_QUICK = (
    "tests/unit/samplers",
    "tests/unit/sampler_file",
    "tests/unit/frontend",
    "tests/unit/loops",
    "tests/behaviour/test_torch_compile.py",
    "tests/behaviour/test_user_loops.py",
)
# What a build with CUDA depends on, and one for CPUs does not.
_OF_CUDA = re.compile(r"/(nvidia|cuda)[-_]", re.IGNORECASE)


@dataclass(frozen=True)
class Counts:
    """What pytest says at the end."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    errors: int = 0


@dataclass(frozen=True)
class Environment:
    """A virtual environment with one torch."""

    python: Path
    torch: str

    @classmethod
    def make(cls, folder: Path, torch: str, index: str | None, any_build: bool) -> Environment | str:
        """Make the environment, or return why that is not possible."""
        venv.create(folder, with_pip=True)
        here = cls(folder / "bin" / "python", torch)
        where = ["--index-url", index] if index else []
        if not any_build:
            # Told before anything large is fetched.
            plan = here._pip("install", "--dry-run", "--quiet", "--report", "-", *where, f"torch=={torch}")
            if plan.returncode:
                return _last_line(plan.stderr)
            if _needs_cuda(plan.stdout):
                return f"torch {torch} is there with CUDA only; give --index of CPU builds, or --any-build"
        for what in ([f"torch=={torch}", *where], ["-c", str(_constraints(folder)), f"torch=={torch}", "-e", ".[dev]"]):
            done = here._pip("install", "--quiet", *what)
            if done.returncode:
                return _last_line(done.stderr)
        return here

    def test(self, files: Sequence[str]) -> Counts:
        """Run test files, all if none is given, and return what came of them."""
        command = [str(self.python), "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", *files]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return counts_in(done.stdout)

    def _pip(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return for each torch whether it could be installed, and how many tests passed, failed and were skipped."""
    parser = Options("version-matrix")
    parser.add_argument("--torch", nargs="+", default=[OLDEST, PINNED])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--any-build", action="store_true")
    parser.add_argument("--index")
    parser.add_argument("--keep", type=Path)
    options = parser.read(args)
    files = list(_QUICK) if options.quick else []
    task = progress.add_task("version matrix", total=2 * len(options.torch))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for version in options.torch:
            where: dict[str, Condition] = {"tested_torch": version, "tests": "quick" if files else "all"}
            environment = Environment.make(folder / version, version, options.index, options.any_build)
            progress.advance(task)
            if isinstance(environment, str):
                rows.append(Row("installed", 0, "", {**where, "reason": environment}))
            else:
                rows.append(Row("installed", 1, "", where))
                counts = environment.test(files)
                rows += [Row(name, value, "tests", where) for name, value in vars(counts).items()]
            progress.advance(task)
    return rows


def counts_in(output: str) -> Counts:
    """Read the last line of pytest: ``3 failed, 700 passed, 12 skipped, 1 error in 60.00s``.

    Returns:
        The counts; one error where pytest ended without such a line.
    """
    found = {
        name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", _last_line(output))
    }
    if not found:
        return Counts(errors=1)
    return Counts(found.get("passed", 0), found.get("failed", 0), found.get("skipped", 0), found.get("error", 0))


def _constraints(folder: Path) -> Path:
    """Write the constraints without the packages whose version torch decides."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    path = folder / "constraints.txt"
    path.write_text("\n".join(line for line in lines if not line.startswith(("torch", "triton"))), encoding="utf-8")
    return path


def _needs_cuda(report: str) -> bool:
    return any(_OF_CUDA.search(url) for url in re.findall(r'"url": "([^"]+)"', report))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:300]
